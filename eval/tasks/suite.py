"""The runner that all tasks share: every contender at every footprint reads every sample."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.common.console import say_once
from eval.common.options import CalibrationTexts, Model
from eval.common.pace import Pace
from eval.common.results import machine, write_result, write_tables
from eval.common.resume import Measurements, digest, digest_of_model, digests
from eval.contenders.base import Contender, EvictionProtocol
from eval.contenders.compressed import COMPRESSING, RANDOM_PINNED, compressing_rule
from eval.contenders.policies import PINNED
from eval.contenders.registry import ADAPTIVE_BY_GATES, load_for, make_contenders, names_or_default
from eval.contenders.solving import solved_setting
from eval.tasks.answers import Sample, answered, counted_from
from eval.tasks.paired import all_beside_full, paired_table
from eval.tasks.report import Row
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

DEFAULT = ("gates", "window")
ROUNDED = 256  # lengths for which prices are solved are multiples of this many tokens


GENERATED = 30  # a token that is generated takes about as long as so many of a prompt, on a CPU

PAIRED_UNITS = {
    "paired": "on the samples of both: `difference` is contender − full cache, `ratio` contender ÷ full cache, each "
    "with a 95 % interval by bootstrap over samples; `kept_where_full_is`: share that the contender gets right `of` "
    "those that the full cache gets right"
}

Scorer = Callable[[dict[str, Any], Sample], dict[str, Any]]


class Part(NamedTuple):
    """Samples of a task for which equally many tokens are generated.

    Attributes:
        by_length: samples by the length in tokens for which prices are solved.
        new_tokens: tokens to generate for each sample; 0: none.
    """

    by_length: dict[int, list[Sample]]
    new_tokens: int


def work(sample: Sample, new_tokens: int) -> float:
    """Return the amount of work that a sample is, in tokens of a prompt."""
    return len(sample.prompt) + len(sample.answer) + GENERATED * new_tokens


def _told(sample: Sample) -> str:
    """Return what a progress line calls a sample's group: its first part that is a word."""
    return next((part for part in sample.group if isinstance(part, str)), "")


def _cell(contender: Contender, setting: Any, sample: Sample, new_tokens: int, weights: dict[str, str]) -> Any:
    """Return the key of a measurement: all that its figures depend on."""
    learned = contender.kind == "ours" or contender.name == ADAPTIVE_BY_GATES
    key = [contender.name, setting, sample.prompt, sample.answer, new_tokens, counted_from(sample)]
    key.append(weights if learned else {})
    if contender.kind not in ("full", "quantised"):  # these keep every key, whenever the question comes
        more = ["text", sample.text] if hasattr(contender, "compress") or contender.name.endswith(PINNED) else []
        key += [*more, *(["held back after", sample.compressed] if sample.held_back else [])]
    return key


class Suite:
    """Model, gates, contenders and calibration of a task. A run that was killed goes on where it stopped.

    Args:
        console: prints tables and progress.
        model: the frozen language model.
        gates: folder of exported gates, hub id or name; None: no gates.
        names: names of contenders, see `eval.eviction.compare.compare`. The full cache is always measured. None: those
            of `DEFAULT`.
        footprints: shares of the full cache.
        calibration: texts on which prices are solved.
        seed: of the choice of windows.
        rules_protocol: of published rules. stream: they evict while the text is read; that is simulated by a mask, and
            nothing is generated. once: they read the prompt with all keys, then keep a share of them.

    Raises:
        SmartKVError: wrong footprints or names, or a model or gates that cannot be loaded.
    """

    def __init__(
        self,
        console: Console,
        model: Model,
        gates: str | None,
        names: Sequence[str] | None,
        footprints: Sequence[float],
        calibration: CalibrationTexts,
        seed: int,
        rules_protocol: EvictionProtocol = "stream",
    ) -> None:
        if not footprints or not all(0 < f <= 1 for f in footprints):
            raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {list(footprints)}")
        if calibration.windows < 1:
            raise SmartKVError(f"calibration.windows must be at least 1, got {calibration.windows}")
        self.console, self.footprints, self.seed = console, sorted(set(footprints)), seed
        self.names = names_or_default(names, DEFAULT, gates)
        self.calibration, self.say = calibration, say_once(console)
        self.solved: dict[int, list[tuple[Contender, float, Any]]] = {}  # by length
        self.rules_protocol = rules_protocol
        if RANDOM_PINNED in self.names and rules_protocol != "once":
            raise SmartKVError(
                f"contender '{RANDOM_PINNED}' reads the prompt with all keys and then keeps a share of them: give "
                "--rules_protocol once, or leave it out"
            )
        known = [name for name in self.names if not self._compresses(name)]
        self.lm, self.bank = load_for(known, model, gates, prompts=True)
        self.device = model.device
        self.settings: dict[str, Any] = {
            "backbone": model.backbone,
            "weights": digest_of_model(self.lm.model),
            "gates": gates,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "device": model.device,
            "contenders": self.names,
            "footprints": self.footprints,
            "calibration": {"windows": calibration.windows, "sources": [s.name for s in calibration.sources]},
            "seed": seed,
            "rules_protocol": rules_protocol,
        }

    def texts(self, sources: list[SourceConfig], split: str, count: int, tokens: int) -> list[Tensor]:
        """Take windows of text.

        Args:
            sources: the mix of texts.
            split: train, validation or test.
            count: number of windows.
            tokens: tokens of a window.

        Returns:
            Ids `[tokens]` of each window.
        """
        plan = plan_windows(sources, {split: count}, self.lm.tokenizer, tokens, 4, self.seed, self.say)
        return list(plan.of_split(split))

    def run(self, out: Path, name: str, parts: Sequence[Part], score: Scorer) -> list[Row]:
        """Read every sample under every contender.

        Args:
            out: folder, in which `<name>.cells` holds the measured figures.
            name: of the task.
            parts: samples with the number of tokens to generate for each.
            score: makes further figures from those of `answered`.

        Returns:
            A row for each part, length, contender and footprint.

        Raises:
            SmartKVError: there are no samples, they are longer than the model's positions, or a contender needs to know
                what they do not say.
        """
        for part in parts:
            self._check(part)
        weights = digests(self.bank)
        settings = {key: self.settings[key] for key in ("backbone", "weights", "dtype")}
        settings["device"] = self.lm.model.device.type
        cells = Measurements(out / f"{name}.cells", settings)
        lengths = sorted({length for part in parts for length in part.by_length})
        for number, length in enumerate(lengths, 1):  # all of them first, so that the time that is left is known
            if length not in self.solved:
                self.console.print(
                    f"prices for {length:,} tokens ({number} of {len(lengths)} lengths)", highlight=False
                )
                self.solved[length] = self._solve(length, cells, weights)
        plan = [
            (part.new_tokens, length, samples, *solved)
            for part in parts
            for length, samples in part.by_length.items()
            for solved in self.solved[length]
        ]
        works = [work(sample, new_tokens) for new_tokens, _, samples, *_ in plan for sample in samples]
        rows: list[Row] = []
        with Pace(self.console, name, works) as pace:
            for new_tokens, length, samples, contender, target, setting in plan:
                pace.describe(f"{_told(samples[0])} {length:,} tokens: {contender.name} at {target:g}")
                row = Row(contender.name, contender.kind, contender.needs, target, length, setting, [])
                for sample in samples:
                    key = _cell(contender, setting, sample, new_tokens, weights)
                    seconds: list[float] = []

                    def measure(
                        contender: Any = contender,
                        setting: Any = setting,
                        sample: Any = sample,
                        new_tokens: int = new_tokens,
                        seconds: list[float] = seconds,
                    ) -> Any:
                        start = time.monotonic()
                        figures = answered(self.lm, contender, setting, sample, new_tokens)
                        seconds.append(time.monotonic() - start)
                        return figures

                    figures = cells.measured(key, measure)
                    own = {"group": sample.group} | ({"cluster": sample.cluster} if sample.cluster else {})
                    row.samples.append(figures | score(figures, sample) | own)
                    pace.advance(work(sample, new_tokens), seconds[0] if seconds else None)
                rows.append(row)
        return rows

    def _solve(self, length: int, cells: Measurements, weights: dict[str, str]) -> list[tuple[Contender, float, Any]]:
        windows = self.texts(self.calibration.sources, "train", self.calibration.windows, length)
        learnt_on, settings = [digest(window) for window in windows], []
        compressing = [name for name in self.names if self._compresses(name)]
        others = [name for name in self.names if name not in compressing]
        contenders = make_contenders(others, self.lm, self.bank, windows, length // 4)
        contenders += [compressing_rule(name, self.lm, length, self.seed) for name in compressing]
        for contender in contenders:
            keeps_all = contender.kind in ("full", "quantised")
            for target in [1.0] if keeps_all else self.footprints:
                try:
                    setting = solved_setting(cells, contender, target, weights, learnt_on)
                    settings.append((contender, target, setting))
                except FootprintOutOfReach as error:  # the other footprints are still measured
                    self.console.print(f"left out: {error}", highlight=False)
        return settings

    def _compresses(self, name: str) -> bool:
        return self.rules_protocol == "once" and name in COMPRESSING

    def _check(self, part: Part) -> None:
        self.check_lengths(part.by_length, part.new_tokens)
        samples = [sample for group in part.by_length.values() for sample in group]
        pinned = [name for name in self.names if name == RANDOM_PINNED or name.endswith(PINNED)]
        if pinned and any(sample.text is None for sample in samples):
            raise SmartKVError(
                f"contender '{pinned[0]}' keeps instruction and question, and this task does not say which tokens "
                "these are: leave it out"
            )

    def by_length(self, samples: Sequence[Sample], more: int = 0) -> dict[int, list[Sample]]:
        """Group samples by the length for which prices are solved: their own, rounded up.

        A share of the cache is then the same share for short and for long samples.

        Args:
            samples: all of them.
            more: tokens that are expected to be generated, where samples have no reference answer.
        """
        groups: dict[int, list[Sample]] = {}
        most = self.lm.architecture.max_positions
        for sample in samples:
            tokens = len(sample.prompt) + len(sample.answer) + more
            groups.setdefault(min(-(-tokens // ROUNDED) * ROUNDED, max(most, tokens)), []).append(sample)
        return dict(sorted(groups.items()))

    def check_lengths(self, by_length: dict[int, list[Sample]], new_tokens: int) -> None:
        """Check that all samples fit the model.

        Args:
            by_length: samples by the length for which prices are solved.
            new_tokens: tokens to generate for each sample.

        Raises:
            SmartKVError: there are no samples, or they are longer than the model's positions.
        """
        if not any(by_length.values()):
            raise SmartKVError("there are no samples to measure: give other texts, lengths or sets")
        longest = max(len(s.prompt) + max(len(s.answer), new_tokens) for samples in by_length.values() for s in samples)
        most = self.lm.architecture.max_positions
        if max(by_length) > most:
            raise SmartKVError(f"texts of {max(by_length)} tokens are asked for, the model has {most} positions")
        if longest > most:
            raise SmartKVError(f"prompt and answer come to {longest} tokens, the model has {most} positions")

    def leave(
        self,
        out: Path,
        name: str,
        settings: dict[str, Any],
        units: dict[str, str],
        rows: Sequence[Row],
        tables: Sequence[Table],
        pictures: Sequence[Path],
        more: dict[str, Any] | None = None,
        paired: dict[str, str] | None = None,
        compared: Sequence[Row] | None = None,
        file: str | None = None,
    ) -> None:
        """Write `<name>.json` and `<name>.md`, and print the tables and the names of all files.

        Args:
            out: folder.
            name: of the task.
            settings: arguments of the task, beside those of the suite.
            units: unit or meaning of each figure.
            rows: all rows.
            tables: of the rows.
            pictures: files that are written already.
            more: further figures.
            paired: figures that are set beside those of the full cache, and their names in the table.
            compared: rows of which these are taken; None: `rows`.
            file: name of the files without their endings; None: that of the task.
        """
        beside = all_beside_full(rows if compared is None else compared, list(paired or {}))
        figures = {"machine": machine(self.device), **(more or {}), "paired": beside}
        figures["rows"] = [vars(row) for row in rows]
        result = write_result(out, file or name, self.settings | settings, {"units": units | PAIRED_UNITS} | figures)
        if paired and beside:
            tables = [*tables, paired_table(f"{name}: beside the full cache, 95 % intervals", beside, paired)]
        for table in tables:
            self.console.print(table)
        for path in (result, write_tables(out / f"{file or name}.md", tables), *pictures):
            self.console.print(f"  {path}", highlight=False)
