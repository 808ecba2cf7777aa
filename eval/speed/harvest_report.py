"""Tables and picture of `python -m eval speed`."""

import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from eval.common.contender_styles import contender_styles
from eval.common.figures import PANEL, legend_beside, new_figure, styled


def _beside(figures: list[dict[str, Any]], row: dict[str, Any], way: str, key: str) -> float | None:
    """Return a figure ÷ that of another way at the same length; None where one of them is missing.

    Of seconds it is the median over rounds of that ratio.
    """
    other = next((f for f in figures if f["way"] == way and f["tokens"] == row["tokens"] and key in f), None)
    if other is None or key not in row:
        return None
    if key == "seconds":
        return statistics.median(mine / base for mine, base in zip(row[key], other[key], strict=True))
    return row[key] / other[key]


def harvest_table(figures: list[dict[str, Any]]) -> Table:
    """Return the table of all ways and lengths, beside eager attention that is kept and beside the forward pass."""
    table = Table(title="Harvest of one window")
    columns = (
        "tokens",
        "way",
        "rounds",
        "tokens/s",
        "× output_attentions",
        "time ÷ forward",
        "peak memory, GiB",
        "÷ its peak",
        "note",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in figures:
        timed, passed = "seconds" in row, "peak_memory" in row
        slower = _beside(figures, row, "output_attentions", "seconds")
        limit = _beside(figures, row, "forward", "seconds")
        memory = _beside(figures, row, "output_attentions", "peak_memory")
        table.add_row(
            f"{row['tokens']:,}",
            row["way"],
            str(len(row["seconds"])) if timed else "",
            f"{row['tokens_per_second']:.0f}" if timed else "",
            "" if slower is None else f"{1 / slower:.2f}",
            "" if limit is None else f"{limit:.2f}",
            f"{row['peak_memory'] / 2**30:.2f}" if passed else "",
            "" if memory is None else f"{memory:.2f}",
            row.get("note", ""),
        )
    return table


def growth_of(figures: list[dict[str, Any]], way: str) -> dict[str, float]:
    """Return how time and memory grow with the tokens of a window; empty with fewer than two lengths.

    Returns:
        exponent: of tokens, with which time grows.
        bytes_a_token: slope of a line through peak memory.
        off_the_line: largest relative distance of a peak from that line.
        from, to, lengths: the shortest and the longest window, and how many there are.
    """
    rows = sorted((f for f in figures if f["way"] == way and "note" not in f), key=lambda f: f["tokens"])
    if len(rows) < 2:
        return {}
    tokens, peaks = (np.array([row[name] for row in rows], float) for name in ("tokens", "peak_memory"))
    seconds = tokens / np.array([row["tokens_per_second"] for row in rows])
    slope, start = np.polyfit(tokens, peaks, 1)
    return {
        "from": rows[0]["tokens"],
        "to": rows[-1]["tokens"],
        "lengths": len(rows),
        "exponent": float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0]),
        "bytes_a_token": float(slope),
        "off_the_line": float(np.abs(peaks / (start + slope * tokens) - 1).max()),
    }


def growth_table(growth: dict[str, dict[str, float]]) -> Table:
    """Return the table of how time and memory grow; `growth`: way -> figures of `growth_of`."""
    table = Table(title="Growth with the window")
    columns = (
        "way",
        "tokens",
        "lengths",
        "time grows as tokens to the",
        "memory, KiB a token",
        "off that line",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for way, g in growth.items():
        if g:
            span = f"{g['from']:,} to {g['to']:,}"
            cells = (f"{g['exponent']:.2f}", f"{g['bytes_a_token'] / 2**10:.0f}", f"{g['off_the_line']:.1%}")
            table.add_row(way, span, str(g["lengths"]), *cells)
    return table


@styled
def harvest_picture(figures: list[dict[str, Any]]) -> Figure:
    """Draw tokens a second and peak memory of each way over the tokens of a window.

    Args:
        figures: of each measurement `way`, `tokens`, and where it was possible `tokens_per_second` and `peak_memory`
            (bytes).
    """
    figure = new_figure((PANEL[0] * 2 + 2.2, PANEL[1]))
    all_axes = figure.subplots(1, 2)
    lengths = sorted({row["tokens"] for row in figures})
    styles = contender_styles(row["way"] for row in figures)
    panels = {"tokens_per_second": ("tokens a second", 1), "peak_memory": ("peak process memory, GiB", 2**30)}
    for axes, (key, (label, unit)) in zip(all_axes, panels.items(), strict=True):
        for way, style in styles.items():
            rows = [row for row in figures if row["way"] == way and key in row]
            axes.plot([row["tokens"] for row in rows], [row[key] / unit for row in rows], **style.plot())
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens a window")
        axes.set_ylabel(label)
    legend_beside(figure, all_axes[0])
    return figure
