"""What all tasks share: samples, read by every contender at every footprint, cell by cell; a killed run goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from eval.contenders.registry import ADAPTIVE_BY_GATES, make_contenders
from eval.contenders.solving import solved_setting
from eval.tasks.answers import Sample, answered, counted_from
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.backbone import Backbone
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

DEFAULT = ("gates", "window")
ROUNDED = 256  # tokens


@dataclass
class Row:
    """One contender at one footprint on all samples.

    Attributes:
        length: tokens of the text for which the price was solved.
        samples: the figures of each, with its `group`.
    """

    contender: str
    kind: str
    needs: str
    target: float
    length: int
    setting: Any
    samples: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """Name and footprint, as pictures have it."""
        return self.contender if self.kind in ("full", "quantised") else f"{self.contender} {self.target:g}"

    def of(self, *group: Any) -> list[dict[str, Any]]:
        """Samples whose group begins so."""
        return [sample for sample in self.samples if tuple(sample["group"][: len(group)]) == group]


Scorer = Callable[[dict[str, Any], Sample], dict[str, Any]]


class Suite:
    """Model, gates, contenders and calibration of a task.

    Args:
        names: of contenders, see `eval.eviction.compare.compare`; the full cache is always among them.
        footprints: shares of the full cache.
        calibration: see `CalibrationTexts`.
        seed: of the choice of windows.

    Raises:
        SmartKVError: footprints that are none, or as `Model.load` and `make_contenders`.
    """

    def __init__(
        self,
        console: Console,
        model: Model,
        gates: str | None,
        names: Sequence[str],
        footprints: Sequence[float],
        calibration: CalibrationTexts,
        seed: int,
    ) -> None:
        if not footprints or not all(0 < f <= 1 for f in footprints):
            raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {list(footprints)}")
        if calibration.windows < 1:
            raise SmartKVError(f"calibration.windows must be at least 1, got {calibration.windows}")
        self.console, self.names, self.footprints, self.seed = console, names, sorted(set(footprints)), seed
        self.calibration, self.say = calibration, say_once(console)
        self.solved: dict[int, list[tuple[Contender, float, Any]]] = {}  # by length
        self.lm: Backbone = model.load()
        self.bank = GateBank.from_pretrained(gates, self.lm.model).to(model.device) if gates else None
        self.settings = {
            "backbone": model.backbone,
            "weights": digest_of_model(self.lm.model),
            "gates": gates,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "device": model.device,
            "contenders": list(names),
            "footprints": self.footprints,
            "calibration": {"windows": calibration.windows, "sources": [s.name for s in calibration.sources]},
            "seed": seed,
        }

    def texts(self, sources: list[SourceConfig], split: str, count: int, tokens: int) -> list[Tensor]:
        """Windows of text, ids `[tokens]` each."""
        plan = plan_windows(sources, {split: count}, self.lm.tokenizer, tokens, 4, self.seed, self.say)
        return list(plan.of_split(split))

    def run(
        self, out: Path, name: str, by_length: dict[int, list[Sample]], new_tokens: int, score: Scorer
    ) -> list[Row]:
        """Every contender on every sample.

        Args:
            out: folder, where `<name>.cells` remembers what is done.
            by_length: samples by the tokens of the text for which prices are solved.
            new_tokens: to generate for each sample; 0: none.
            score: further figures, from what `answered` found.

        Raises:
            SmartKVError: text and answer are longer than the model's positions.
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
                        given = [sample.prompt, sample.answer, new_tokens, counted_from(sample)]
                        key = [contender.name, setting, *given, weights if learned else {}]

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
        learnt_on, found = [digest(window) for window in windows], []
        for contender in make_contenders(self.names, self.lm, self.bank, windows, length // 4):
            whole = contender.kind in ("full", "quantised")
            for target in [1.0] if whole else self.footprints:
                try:
                    found.append((contender, target, solved_setting(cells, contender, target, weights, learnt_on)))
                except FootprintOutOfReach as error:  # one footprint out of reach is no reason to lose the others
                    progress.console.print(f"left out: {error}", highlight=False)
        return found

    def by_length(self, samples: Sequence[Sample]) -> dict[int, list[Sample]]:
        """Samples by the tokens for which prices are solved: their own, rounded up, so that a share of the cache is
        the same share for short and for long ones."""
        found: dict[int, list[Sample]] = {}
        most = self.lm.architecture.max_positions
        for sample in samples:
            tokens = len(sample.prompt) + len(sample.answer)
            found.setdefault(min(-(-tokens // ROUNDED) * ROUNDED, max(most, tokens)), []).append(sample)
        return dict(sorted(found.items()))

    def check_lengths(self, by_length: dict[int, list[Sample]], new_tokens: int) -> None:
        """Before anything is measured. Raises SmartKVError where there are no samples, or too long ones."""
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
    ) -> None:
        """Write `<name>.json` and `<name>.md` into `out`, and say what was found and where it lies."""
        figures = {"machine": machine(self.settings["device"]), "rows": [vars(row) for row in rows]}
        result = write_result(out, name, self.settings | settings, {"units": units} | figures)
        for table in tables:
            self.console.print(table)
        for path in (result, write_tables(out / f"{name}.md", tables), *pictures):
            self.console.print(f"  {path}", highlight=False)


def mean(values: Sequence[Any]) -> float | None:
    """Of what is known; None: nothing is."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def merged(rows: Sequence[Row]) -> list[Row]:
    """One row a contender, footprint and length, with the samples of all."""
    found: dict[tuple[str, float, int], Row] = {}
    for row in rows:
        key = (row.contender, row.target, row.length)
        known = found.setdefault(key, replace(row, samples=[]))
        known.samples += row.samples
    return list(found.values())


def right_where_full_is(row: Row, full: Row, key: str, *group: Any) -> tuple[float | None, int]:
    """Share of the samples that count above a half by `key`, among those where the full cache does; and how many they
    are. A row that lacks the group has none."""
    if not row.of(*group):
        return None, 0
    pairs = zip(row.of(*group), full.of(*group), strict=True)
    asked = [mine[key] for mine, theirs in pairs if (theirs[key] or 0) > 0.5]
    return (sum((value or 0) > 0.5 for value in asked) / len(asked) if asked else None), len(asked)


def all_lengths(rows: Sequence[Row]) -> list[Row]:
    """One row a contender and footprint, with the samples of all lengths.

    A footprint that is out of reach at some length is left out there. Means are to be over the same samples for
    everybody, so such a row then has none of the groups that it has not seen all of.
    """
    found = merged([replace(row, length=0) for row in rows])
    full = full_of(found, 0)
    for row in found:
        groups = {tuple(sample["group"]) for sample in full.samples}
        lacking = {group for group in groups if len(row.of(*group)) != len(full.of(*group))}
        row.samples = [sample for sample in row.samples if tuple(sample["group"]) not in lacking]
    return found


def full_of(rows: Sequence[Row], length: int) -> Row:
    """The full cache's row at that length."""
    return next(row for row in rows if row.kind == "full" and row.length == length)


def score_table(title: str, columns: Sequence[str], lines: Sequence[tuple[Row, Sequence[str]]]) -> Table:
    """A line for each contender at each footprint, sections between contenders."""
    table = Table(title=title)
    for number, name in enumerate(("", "footprint", "stored", *columns)):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for number, (row, cells) in enumerate(lines):
        if number and lines[number - 1][0].contender != row.contender:
            table.add_section()
        footprint, stored = (mean([sample[key] for sample in row.samples]) for key in ("footprint", "stored"))
        held = "mask" if row.samples and stored is None else shown(stored, 3)
        table.add_row(row.contender, shown(footprint, 3), held, *cells)
    return table


def group_table(title: str, rows: Sequence[Row], groups: Sequence[str], key: str, digits: int = 2) -> Table:
    """A line for each first part of a group, a column for each contender at each footprint; below, means over all."""
    table = Table(title=title)
    table.add_column("")
    for row in rows:
        table.add_column(row.label, justify="right", no_wrap=True)
    for group in groups:
        cells = [shown(mean([sample[key] for sample in row.of(group)]), digits) for row in rows]
        table.add_row(group, *cells)
    table.add_section()
    most = max(len(row.samples) for row in rows)  # a mean over fewer is another thing
    for name in dict.fromkeys((key, "nll", "footprint", "stored")):
        values = ([sample[name] for sample in row.samples if len(row.samples) == most] for row in rows)
        cells = [shown(mean(each), 3) for each in values]
        table.add_row(f"mean {'NLL' if name == 'nll' else name}", *cells)
    return table


def counted(share: float | None, asked: int) -> str:
    """What `right_where_full_is` found, for a table: 13 of 15."""
    return f"{round((share or 0) * asked)} of {asked}"


def shown(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """A figure for a table; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.0%}" if percent else f"{value:.{digits}f}"
