"""Rows of results that all tasks share, and tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table


@dataclass
class Row:
    """One contender at one footprint on all samples.

    Attributes:
        contender: name of the contender.
        kind: see `Contender`.
        needs: see `Contender`.
        target: footprint that was asked for.
        length: tokens of the texts for which the price was solved.
        setting: result of `Contender.solved`.
        samples: figures of each sample, with its `group`.
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
        """Name and footprint, for tables and pictures."""
        return self.contender if self.kind in ("full", "quantised") else f"{self.contender} {self.target:g}"

    def of(self, *group: Any) -> list[dict[str, Any]]:
        """Return the samples whose group begins with `group`."""
        return [sample for sample in self.samples if tuple(sample["group"][: len(group)]) == group]


def mean(values: Sequence[Any]) -> float | None:
    """Return the mean of the values that are not None; None: there are none."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def merged(rows: Sequence[Row]) -> list[Row]:
    """Merge rows into one for each contender, footprint and length, with all their samples."""
    rows_by_key: dict[tuple[str, float, int], Row] = {}
    for row in rows:
        key = (row.contender, row.target, row.length)
        rows_by_key.setdefault(key, replace(row, samples=[])).samples += row.samples
    return list(rows_by_key.values())


def right_where_full_is(row: Row, full: Row, key: str, *group: Any) -> tuple[float | None, int]:
    """Return the share of samples that are right, among those that the full cache gets right, and their number.

    Args:
        row: of a contender. Without samples of the group its share is None, its number 0.
        full: the full cache's row with the same samples.
        key: figure that is above a half where a sample is right.
        group: beginning of the samples' group.
    """
    if not row.of(*group):
        return None, 0
    pairs = zip(row.of(*group), full.of(*group), strict=True)
    asked = [own[key] for own, whole in pairs if (whole[key] or 0) > 0.5]
    return (sum((value or 0) > 0.5 for value in asked) / len(asked) if asked else None), len(asked)


def all_lengths(rows: Sequence[Row]) -> list[Row]:
    """Merge rows into one for each contender and footprint, with the samples of all lengths.

    Means are over the same samples for all contenders. A footprint that is out of reach at some length was not measured
    there; its row keeps only groups of which it has all samples.
    """
    merged_rows = merged([replace(row, length=0) for row in rows])
    full = full_of(merged_rows, 0)
    for row in merged_rows:
        groups = {tuple(sample["group"]) for sample in full.samples}
        lacking = {group for group in groups if len(row.of(*group)) != len(full.of(*group))}
        row.samples = [sample for sample in row.samples if tuple(sample["group"]) not in lacking]
    return merged_rows


def full_of(rows: Sequence[Row], length: int) -> Row:
    """Return the full cache's row at a length."""
    return next(row for row in rows if row.kind == "full" and row.length == length)


def score_table(title: str, columns: Sequence[str], lines: Sequence[tuple[Row, Sequence[str]]]) -> Table:
    """Make a table with a line for each contender at each footprint.

    Args:
        title: of the table.
        columns: names of the columns after footprint and stored bytes.
        lines: rows, each with the cells of `columns`.
    """
    table = Table(title=title)
    for number, name in enumerate(("", "footprint", "stored", *columns)):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for number, (row, cells) in enumerate(lines):
        if number and lines[number - 1][0].contender != row.contender:
            table.add_section()
        footprint, stored = (mean([sample[key] for sample in row.samples]) for key in ("footprint", "stored"))
        stored_cell = "mask" if row.samples and stored is None else shown(stored, 3)
        table.add_row(row.contender, shown(footprint, 3), stored_cell, *cells)
    return table


def group_table(title: str, rows: Sequence[Row], groups: Sequence[str], key: str, digits: int = 2) -> Table:
    """Make a table with a line for each group, a column for each contender at each footprint, and means over all.

    Args:
        title: of the table.
        rows: of all contenders.
        groups: first parts of samples' groups.
        key: figure of a sample that is averaged.
        digits: after the decimal point.
    """
    table = Table(title=title)
    table.add_column("")
    for row in rows:
        table.add_column(row.label, justify="right", no_wrap=True)
    for group in groups:
        cells = [shown(mean([sample[key] for sample in row.of(group)]), digits) for row in rows]
        table.add_row(group, *cells)
    table.add_section()
    most = max(len(row.samples) for row in rows)  # a mean over fewer samples is not comparable
    for name in dict.fromkeys((key, "nll", "footprint", "stored")):
        values = ([sample[name] for sample in row.samples if len(row.samples) == most] for row in rows)
        cells = [shown(mean(each), 3) for each in values]
        table.add_row(f"mean {'NLL' if name == 'nll' else name}", *cells)
    return table


def counted(share: float | None, asked: int) -> str:
    """Format a result of `right_where_full_is` for a table, such as `13 of 15`."""
    return f"{round((share or 0) * asked)} of {asked}"


def shown(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """Format a figure for a table; None becomes an empty cell."""
    if value is None:
        return ""
    return f"{value:.0%}" if percent else f"{value:.{digits}f}"
