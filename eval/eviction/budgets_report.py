"""What `python -m eval budgets` leaves: rows, tables and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.common.results import provenance, save_picture, write_result, write_tables
from eval.eviction.kinds_figure import KindBar, kinds_picture

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class BudgetRow:
    """A budget on the windows of one kind and length, beside a fixed price that holds as much at their end.

    Attributes:
        kind: name of the kind of text.
        length: planned length, which is that of the windows, in tokens.
        asked: the budget, a share of the full cache's keys.
        held, held_fixed: keys held at the end ÷ those of a full cache, of each window.
        footprint, footprint_fixed: share of a full cache's keys that scored queries saw, mean over windows.
        delta_nll, delta_nll_fixed: NLL − the full cache's, nats a token, of each window.
        interval, interval_fixed: of their means, 95 %, bootstrap over documents; None: they are too few.
        ratio: mean loss under the budget ÷ mean loss at the fixed price, paired.
        ratio_interval, difference_interval: of the ratio and of the difference of the means.
        nll_full: NLL of the full cache, nats a token, mean over windows.
        documents: that the windows are from.
    """

    kind: str
    length: int
    asked: float
    held: list[float]
    held_fixed: list[float]
    footprint: float
    footprint_fixed: float
    delta_nll: list[float]
    delta_nll_fixed: list[float]
    interval: Interval
    interval_fixed: Interval
    ratio: float
    ratio_interval: Interval
    difference_interval: Interval
    nll_full: float
    documents: int


@dataclass(frozen=True)
class LongerRow:
    """A budget on texts that are longer than it was planned for.

    Attributes:
        kind: name of the kind of text.
        length: planned length, in tokens.
        read: tokens that were read.
        asked: the budget, a share of the full cache's keys at the planned length.
        held: keys held at the end ÷ those of a full cache at the planned length, of each window.
    """

    kind: str
    length: int
    read: int
    asked: float
    held: list[float]


UNITS = {
    "held": "keys held when the window was read ÷ keys of a full cache, of each window",
    "footprint": "keys seen ÷ keys of a full cache, over the queries whose next token is scored",
    "delta_nll": "nats a token above the full cache, of each window; intervals: 95 %, bootstrap over documents",
    "ratio": "mean delta_nll under the budget ÷ that at the fixed price, on the same windows",
    "longer": "held of texts beyond the plan: keys held at their end ÷ keys of a full cache at the planned length",
}


def leave(
    console: Any, out: Path, settings: dict[str, Any], rows: Sequence[BudgetRow], longer: Sequence[LongerRow]
) -> None:
    """Write and print everything."""
    figures = {"rows": [asdict(row) for row in rows], "longer": [asdict(row) for row in longer]}
    paths = [write_result(out, "budgets", settings, {"units": UNITS} | figures)]
    tables = [kept_table(rows, longer, settings["backbone"]), loss_table(rows, settings["backbone"])]
    paths.append(write_tables(out / "budgets.md", tables, provenance("budgets", settings)))
    for length in dict.fromkeys(row.length for row in rows):
        here = [row for row in rows if row.length == length]
        bars = [KindBar("gates", row.kind, row.asked, mean(row.delta_nll_fixed), row.interval_fixed) for row in here]
        bars += [KindBar("gates@budget", row.kind, row.asked, mean(row.delta_nll), row.interval) for row in here]
        paths.append(save_picture(kinds_picture(bars), out / f"budgets_{length}.png"))
    for table in tables:
        console.print(table)
    for path in paths:
        console.print(f"  {path}", highlight=False)


def kept_table(rows: Sequence[BudgetRow], longer: Sequence[LongerRow], backbone: str) -> Table:
    """Make the table of what was asked and kept, by kind and length: lowest and highest window."""
    asked = list(dict.fromkeys(row.asked for row in rows))
    table = Table(title=f"{backbone}: what each budget holds at the end of a text, lowest and highest window")
    for name in ("planned", "kind", "windows", *(f"{each:g}" for each in asked), "at twice the plan"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    of: Callable[[Any], tuple[int, str]] = lambda row: (row.length, row.kind)  # noqa: E731
    places = list(dict.fromkeys(of(row) for row in rows))
    for number, place in enumerate(places):
        if number and places[number - 1][0] != place[0]:
            table.add_section()
        own = {row.asked: row for row in rows if of(row) == place}
        beyond = [share / row.asked for row in longer if of(row) == place for share in row.held]
        kept = [_range(own[each].held) if each in own else "–" for each in asked]
        said = f"× {min(beyond):.3f}–{max(beyond):.3f}" if beyond else "–"
        table.add_row(f"{place[0]:,}", place[1], str(len(next(iter(own.values())).held)), *kept, said)
    table.caption = "At twice the plan: keys held ÷ the budget, where the text is twice as long as planned."
    return table


def loss_table(rows: Sequence[BudgetRow], backbone: str) -> Table:
    """Make the table of losses, under the budget and at the fixed price, on the same windows."""
    table = Table(title=f"{backbone}: ΔNLL, nats a token, at equally many keys held at the end")
    names = ("planned", "kind", "asked", "held", "held, fixed", "fixed price (95 %)", "budget (95 %)", "ratio (95 %)")
    for name in names:
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if number and (rows[number - 1].length, rows[number - 1].kind) != (row.length, row.kind):
            table.add_section()
        kept = f"{mean(row.held):.4f}", f"{mean(row.held_fixed):.4f}"
        losses = _loss(row.delta_nll_fixed, row.interval_fixed), _loss(row.delta_nll, row.interval)
        ratio = f"{row.ratio:.2f}"
        if row.ratio_interval is not None:
            ratio += f" ({row.ratio_interval[0]:.2f} to {row.ratio_interval[1]:.2f})"
        if row.interval_fixed is None or row.interval_fixed[0] <= 0:  # a ratio of losses that may be none
            ratio = "–"
        table.add_row(f"{row.length:,}", row.kind, f"{row.asked:g}", *kept, *losses, ratio)
    table.caption = "Intervals: bootstrap over documents. Ratio: budget ÷ fixed price, where that loses something."
    return table


def mean(figures: Sequence[float]) -> float:
    """Return the mean."""
    return sum(figures) / len(figures)


def _range(shares: Sequence[float]) -> str:
    return f"{min(shares):.4f}–{max(shares):.4f}"


def _loss(losses: Sequence[float], interval: Interval) -> str:
    inside = "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{mean(losses):+.4f}{inside}"
