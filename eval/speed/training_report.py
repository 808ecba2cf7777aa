"""Tables and picture of `python -m eval training`."""

from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from eval.common.contender_styles import BLUE, contender_styles
from eval.common.figures import new_figure, styled


def table_of_ways(ways: list[dict[str, Any]]) -> Table:
    """Return the table of both ways to train at each batch size, and of how fast keys are read."""
    table = Table(title="48 gates together and one by one, and keys from disk")
    for name in (
        "batch",
        "keys a step",
        "together, s",
        "one by one, s",
        "× faster",
        "rows/s trained",
        "rows/s from shards",
        "rows/s by torch.load",
    ):
        table.add_column(name, justify="right")
    for w in ways:
        if "note" in w:
            table.add_row(f"{w['batch']:,}", w["note"], *[""] * 6)
            continue
        speeds = [f"{w[name]:,.0f}" for name in ("rows_trained", "rows_from_shards", "rows_from_torch_load")]
        table.add_row(
            f"{w['batch']:,}",
            f"{w['rows_a_step']:,.0f}",
            f"{w['together']:.2f}",
            f"{w['apart']:.2f}",
            f"{w['ratio']:.2f}",
            *speeds,
        )
    return table


def table_of_heads(heads: list[dict[str, Any]], batch: int) -> Table:
    """Return the table of models with more and more heads; `batch` in keys a head."""
    table = Table(title=f"Steps of {batch:,} keys a head as heads grow")
    for name in ("model", "heads", "keys a step", "steps/s", "head-steps/s", "peak memory, GiB", "shards on disk, GiB"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for h in heads:
        if "note" in h:
            table.add_row(h["model"], str(h["heads"]), h["note"], "", "", "", "")
            continue
        speed = h["steps_per_second"]
        sizes = [f"{h[name] / 2**30:.2f}" for name in ("peak_memory", "shard_bytes")]
        table.add_row(
            h["model"],
            str(h["heads"]),
            f"{h['rows_a_step']:,.0f}",
            f"{speed:.2f}",
            f"{speed * h['heads']:,.0f}",
            *sizes,
        )
    return table


@styled
def training_picture(ways: list[dict[str, Any]], heads: list[dict[str, Any]]) -> Figure:
    """Draw the seconds of both ways at each batch size, and speed and memory of models with more and more heads.

    Args:
        ways: of each batch size `batch`, and the seconds `together` and `apart`, or a `note` why there are none.
        heads: of each model `model`, `heads`, `steps_per_second` and `peak_memory` (bytes), or a `note`.
    """
    figure = new_figure((12.6, 3.9))
    left, middle, right = figure.subplots(1, 3)
    measured = [row for row in ways if "note" not in row]
    for shift, (way, style) in zip((-0.2, 0.2), contender_styles(("together", "apart")).items(), strict=True):
        places = [place + shift for place in range(len(measured))]
        bars = left.bar(places, [row[way] for row in measured], 0.38, **style.bar())
        left.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    left.set_xticks(range(len(measured)), [f"{row['batch']:,}" for row in measured])
    left.set_xlabel("batch, keys a head")
    left.set_ylabel("seconds for the same steps of 48 gates")
    left.set_ylim(0, 1.3 * max((max(row["together"], row["apart"]) for row in measured), default=1))
    left.grid(axis="x", visible=False)
    left.legend(loc="upper left")
    rows = sorted((row for row in heads if "note" not in row), key=lambda row: row["heads"])
    names = [f"{row['model']}\n{row['heads']} gates" for row in rows]
    for axes, label, values in (
        (middle, "steps of one head a second", [row["steps_per_second"] * row["heads"] for row in rows]),
        (right, "peak memory, GiB", [row["peak_memory"] / 2**30 for row in rows]),
    ):
        # models differ in more than their number of heads, so that no line joins them
        bars = axes.barh(range(len(rows)), values, 0.62, color=BLUE)
        form = "{:,.0f}" if max(values, default=1) > 10 else "{:.2f}"
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(values, default=1))
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    return figure
