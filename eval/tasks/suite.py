"""The runner that all tasks share: every contender at every footprint reads every sample."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from eval.common.console import say_once
from eval.common.options import CalibrationTexts, Model
from eval.common.results import machine, write_result, write_tables
from eval.common.resume import Measurements, digest, digest_of_model, digests
from eval.contenders.base import Contender
from eval.contenders.registry import ADAPTIVE_BY_GATES, load_for, make_contenders, names_or_default
from eval.contenders.solving import solved_setting
from eval.tasks.answers import Sample, answered, counted_from
from eval.tasks.report import Row
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

DEFAULT = ("gates", "window")
ROUNDED = 256  # lengths for which prices are solved are multiples of this many tokens


Scorer = Callable[[dict[str, Any], Sample], dict[str, Any]]


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
    ) -> None:
        if not footprints or not all(0 < f <= 1 for f in footprints):
            raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {list(footprints)}")
        if calibration.windows < 1:
            raise SmartKVError(f"calibration.windows must be at least 1, got {calibration.windows}")
        self.console, self.footprints, self.seed = console, sorted(set(footprints)), seed
        self.names = names_or_default(names, DEFAULT, gates)
        self.calibration, self.say = calibration, say_once(console)
        self.solved: dict[int, list[tuple[Contender, float, Any]]] = {}  # by length
        self.lm, self.bank = load_for(self.names, model, gates)
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

    def run(
        self, out: Path, name: str, by_length: dict[int, list[Sample]], new_tokens: int, score: Scorer
    ) -> list[Row]:
        """Read every sample under every contender.

        Args:
            out: folder, in which `<name>.cells` holds the measured figures.
            name: of the task.
            by_length: samples by the length in tokens for which prices are solved.
            new_tokens: tokens to generate for each sample; 0: none.
            score: makes further figures from those of `answered`.

        Returns:
            A row for each contender, footprint and length.

        Raises:
            SmartKVError: there are no samples, or they are longer than the model's positions.
        """
        self.check_lengths(by_length, new_tokens)
        weights = digests(self.bank)
        settings = {key: self.settings[key] for key in ("backbone", "weights", "dtype")}
        settings["device"] = self.lm.model.device.type
        cells = Measurements(out / f"{name}.cells", settings)
        rows: list[Row] = []
        with Progress(console=self.console) as progress:
            for length, samples in by_length.items():
                task = progress.add_task(f"{length:,} tokens: calibration", total=None)
                if length not in self.solved:
                    self.solved[length] = self._solve(length, cells, weights, progress)
                solved = self.solved[length]
                progress.update(task, total=len(solved) * len(samples))
                for contender, target, setting in solved:
                    progress.update(task, description=f"{length:,} tokens: {contender.name} at {target:g}")
                    learned = contender.kind == "ours" or contender.name == ADAPTIVE_BY_GATES
                    row = Row(contender.name, contender.kind, contender.needs, target, length, setting, [])
                    for sample in samples:
                        question = [sample.prompt, sample.answer, new_tokens, counted_from(sample)]
                        key = [contender.name, setting, *question, weights if learned else {}]

                        def measure(contender: Any = contender, setting: Any = setting, sample: Any = sample) -> Any:
                            return answered(self.lm, contender, setting, sample, new_tokens)

                        figures = cells.measured(key, measure)
                        row.samples.append(figures | score(figures, sample) | {"group": sample.group})
                        progress.advance(task)
                    rows.append(row)
        return rows

    def _solve(
        self, length: int, cells: Measurements, weights: dict[str, str], progress: Progress
    ) -> list[tuple[Contender, float, Any]]:
        windows = self.texts(self.calibration.sources, "train", self.calibration.windows, length)
        learnt_on, settings = [digest(window) for window in windows], []
        for contender in make_contenders(self.names, self.lm, self.bank, windows, length // 4):
            keeps_all = contender.kind in ("full", "quantised")
            for target in [1.0] if keeps_all else self.footprints:
                try:
                    setting = solved_setting(cells, contender, target, weights, learnt_on)
                    settings.append((contender, target, setting))
                except FootprintOutOfReach as error:  # the other footprints are still measured
                    progress.console.print(f"left out: {error}", highlight=False)
        return settings

    def by_length(self, samples: Sequence[Sample]) -> dict[int, list[Sample]]:
        """Group samples by the length for which prices are solved: their own, rounded up.

        A share of the cache is then the same share for short and for long samples.
        """
        groups: dict[int, list[Sample]] = {}
        most = self.lm.architecture.max_positions
        for sample in samples:
            tokens = len(sample.prompt) + len(sample.answer)
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
        """
        figures = {"machine": machine(self.device), **(more or {}), "rows": [vars(row) for row in rows]}
        result = write_result(out, name, self.settings | settings, {"units": units} | figures)
        for table in tables:
            self.console.print(table)
        for path in (result, write_tables(out / f"{name}.md", tables), *pictures):
            self.console.print(f"  {path}", highlight=False)
