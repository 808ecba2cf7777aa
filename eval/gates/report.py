"""Figures, tables and pictures of `python -m eval gates`: R², order and calibration."""

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.common.figures import (
    PANEL,
    heads_heatmap,
    lifespan_histogram,
    lines_by_layer,
    new_figure,
    predicted_against_true,
    series_style,
    styled,
)
from eval.common.results import save_picture
from smartkv.gates.bank import GateBank, head_name
from smartkv.metrics.bootstrap import bootstrap
from smartkv.metrics.nulls import NULLS
from smartkv.metrics.r2 import RegressionSums
from smartkv.metrics.ranking import Reliability

Nulls = dict[str, RegressionSums]
BESIDE = ("token_table", "position", "constant")  # the nulls that the picture by layer shows


def r2_figures(sums: RegressionSums, nulls: Nulls, names: list[str]) -> dict[str, Any]:
    """Return R² of gates and nulls for JSON; `names`: of the heads."""
    r2, null_r2 = sums.r2(), {name: nulls[name].r2() for name in NULLS}
    table = nulls["token_table"]
    gap = bootstrap(len(sums.count), lambda w: (sums.r2(w) - table.r2(w)).nanmean(dim=-1))
    return {
        "r2_mean": float(r2.nanmean()),
        "r2_mean_interval_95": list(sums.interval()),
        "r2_median": float(r2.nanmedian()),
        "r2_token_table": float(null_r2["token_table"].nanmean()),
        "r2_above_token_table": float(r2.nanmean() - null_r2["token_table"].nanmean()),
        "r2_above_token_table_interval_95": list(gap),
        "r2_nulls": {name: float(value.nanmean()) for name, value in null_r2.items()},
        "r2_head": dict(zip(names, r2.tolist(), strict=True)),
        "r2_head_nulls": {n: dict(zip(names, v.tolist(), strict=True)) for n, v in null_r2.items()},
    }


def _by_layer(bank: GateBank, sums: RegressionSums, nulls: Nulls) -> dict[str, list[float]]:
    values = {"gates": sums.r2()} | {name: nulls[name].r2() for name in NULLS}
    return {name: v.view(len(bank.layers), -1).nanmean(dim=1).tolist() for name, v in values.items()}


def r2_pictures(
    folder: Path,
    bank: GateBank,
    sums: RegressionSums,
    nulls: Nulls,
    drawn: list[tuple[Tensor, Tensor]],
    follow_up: int,
) -> list[Path]:
    """Draw R² by head, R² by layer beside the nulls, and prediction against truth for three heads.

    Args:
        folder: for the pictures.
        bank: the gates.
        sums: of the gates' predictions.
        nulls: sums of each null.
        drawn: predictions and true values of some windows, `[gates, rows]` each.
        follow_up: tokens; lifespans are capped there.
    """
    r2, by_layer = sums.r2(), _by_layer(bank, sums, nulls)
    title = f"R² by head on {len(sums.count)} validation windows, mean {r2.nanmean():.3f}"
    grid, names = r2.view(len(bank.layers), -1).numpy(), [head_name(*head) for head in bank.heads]
    return [
        save_picture(heads_heatmap(grid, bank.layers, title, "R²"), folder / "r2_by_head.png"),
        save_picture(
            r2_by_layer_picture({name: by_layer[name] for name in ("gates", *BESIDE)}, bank.layers),
            folder / "r2_by_layer.png",
        ),
        save_picture(_histograms(drawn, r2, names, follow_up), folder / "predicted_against_true.png"),
    ]


def r2_by_layer_picture(by_layer: dict[str, list[float]], layers: list[int]) -> Figure:
    """Draw the R² of gates and nulls, name -> mean over the KV heads of each layer."""
    title = "R² by layer: gates beside their nulls"
    return lines_by_layer(by_layer, layers, title, "R² of log4 lifespan, mean over KV heads", contenders=True)


def print_r2(console: Console, bank: GateBank, figures: dict[str, Any], sums: RegressionSums, nulls: Nulls) -> None:
    """Print the table by layer and a summary line; `figures` are those of `r2_figures`."""
    heads = {"gates": sums.r2()} | {name: nulls[name].r2() for name in NULLS}
    console.print(_table(_by_layer(bank, sums, nulls), bank.layers, heads))
    low, high = figures["r2_mean_interval_95"]
    below, above = figures["r2_above_token_table_interval_95"]
    console.print(
        f"mean R² {figures['r2_mean']:.3f} (95 % over windows: {low:.3f} to {high:.3f}), "
        f"{figures['r2_above_token_table']:+.3f} against the token-id table "
        f"({below:+.3f} to {above:+.3f}); {len(bank)} heads, {len(sums.count)} windows"
    )


def _histograms(drawn: list[tuple[Tensor, Tensor]], r2: Tensor, names: list[str], follow_up: int) -> Figure:
    prediction, truth = (torch.cat(parts, dim=1).numpy() for parts in zip(*drawn, strict=True))
    order = r2.nan_to_num(-1).argsort().tolist()
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    limit = math.log2(follow_up) / 2
    panels = {
        f"{place}: {names[gate]}, R² {r2[gate]:.2f}": lifespan_histogram(prediction[gate], truth[gate], limit)
        for place, gate in chosen.items()
    }
    return predicted_against_true(panels, limit)


def _table(by_layer: dict[str, list[float]], layers: list[int], heads: dict[str, Tensor]) -> Table:
    table = Table(title="R² of log4 lifespan on validation text, mean over KV heads")
    table.add_column("layer", justify="right")
    for name in by_layer:
        table.add_column(name.replace("_", " "), justify="right")
    for place, layer in enumerate(layers):
        table.add_row(str(layer), *(f"{values[place]:.3f}" for values in by_layer.values()))
    table.add_section()
    table.add_row("mean", *(f"{float(values.nanmean()):.3f}" for values in heads.values()))
    table.add_row("median", *(f"{float(values.nanmedian()):.3f}" for values in heads.values()))
    return table


COLUMNS = {
    "concordance": "pairs in order",
    "top_10": "top 10 % by head",
    "top_25": "top 25 % by head",
    "top_10_all": "top 10 % of all",
    "top_25_all": "top 25 % of all",
}


def order_table(order: dict[str, Any]) -> Table:
    """Return the table of the order figures of each score; `order` as it stands in gates.json."""
    age = order["future_attention_from_age"]
    title = "pairs of keys in order" + (f", and future attention from age {age} on held by the top keys" if age else "")
    table = Table(title=title)
    table.add_column("scores")
    figures = [name for name in COLUMNS if any(name in row for row in order["scores"].values())]
    for name in figures:
        table.add_column(COLUMNS[name], justify="right")
    for name, row in order["scores"].items():
        table.add_row(name.replace("_", " "), *(f"{row[figure]['mean']:.3f}" for figure in figures))
    return table


def calibration(reliability: Reliability, ages: list[int]) -> dict[str, Any]:
    """Return predicted probabilities to live beyond each of `ages` and the shares that did, for JSON."""
    share = reliability.happened / reliability.count
    mean = reliability.predicted / reliability.count
    return {
        "ages": ages,
        "expected_calibration_error": reliability.error().tolist(),
        "keys": reliability.count.long().tolist(),
        "predicted": [[value if value == value else None for value in row] for row in mean.tolist()],
        "happened": [[value if value == value else None for value in row] for row in share.tolist()],
    }


@styled
def reliability_picture(figures: dict[str, Any]) -> Figure:
    """Draw predicted probability against the share that lived beyond each age; `figures` are of `calibration`."""
    figure = new_figure((PANEL[0] + 0.6, PANEL[1] + 0.7))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#777777", linewidth=1.0, linestyle="--", label="calibrated")
    rows = zip(figures["ages"], figures["predicted"], figures["happened"], strict=True)
    for number, (age, predicted, happened) in enumerate(rows):
        points = [(p, h) for p, h in zip(predicted, happened, strict=True) if p is not None]
        error = figures["expected_calibration_error"][number]
        label = f"beyond {age} tokens (error {error:.3f})"
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **series_style(number))
    axes.set_xlabel("predicted probability that a key lives on")
    axes.set_ylabel("share of these keys that did")
    axes.set_title("Lives beyond ages")
    axes.legend()
    return figure
