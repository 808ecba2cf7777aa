"""Figures of gates, for TensorBoard and for files: axes named, colours that a colour-blind reader can tell apart."""

from collections.abc import Mapping, Sequence

import functools
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
}


def styled(draw):
    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn

# Okabe and Ito's palette: distinguishable with any colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def heads_heatmap(values: np.ndarray, layers: Sequence[int], title: str, label: str, low: float = 0.0) -> Figure:
    """`values` `[layers, kv_heads]` as a heatmap with a figure in each cell where there is room."""
    rows, columns = values.shape
    figure = Figure(figsize=(max(4.0, 1.6 + 0.55 * columns), max(3.0, 1.2 + 0.24 * rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=max(float(np.nanmax(values)), low + 1e-6))
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for row in range(rows):
        for column in range(columns):
            if np.isfinite(values[row, column]) and columns <= 16:
                colour = "white" if values[row, column] < middle else "black"
                axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(columns))
    axes.set_yticks(range(rows), [str(layer) for layer in layers], fontsize=7)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def predicted_against_true(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]], limit: float, unit: str = "log4 lifespan"
) -> Figure:
    """A two-dimensional histogram of prediction against truth for each named head (counts on a log scale)."""
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    edges = np.linspace(0, limit, 41)
    for place, (name, (prediction, truth)) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        counts, _, _ = np.histogram2d(truth, np.clip(prediction, 0, limit), bins=(edges, edges))
        image = axes.pcolormesh(edges, edges, np.log10(counts.T + 1), cmap="viridis")
        axes.plot([0, limit], [0, limit], color="white", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"true {unit}")
        axes.set_ylabel(f"predicted {unit}")
        figure.colorbar(image, ax=axes, label="log10(keys + 1)")
    return figure


def lines_by_layer(
    series: Mapping[str, Sequence[float]], layers: Sequence[int], title: str, label: str, log: bool = False
) -> Figure:
    """One line a series over the layers."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(series.items()):
        axes.plot(
            layers, values, label=name, color=COLOURS[number % len(COLOURS)], marker="osD^vP*"[number % 7], markersize=4
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def survival(series: Mapping[str, np.ndarray], longest: int, title: str) -> Figure:
    """Share of keys that are hit again after each age; `series`: name -> lifespans in tokens, any shape."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.add_subplot()
    ages = np.unique(np.geomspace(1, longest, 80).astype(int))
    for number, (name, lifespans) in enumerate(series.items()):
        alive = [float((lifespans > age).mean()) for age in ages]
        axes.plot(
            ages, alive, color=COLOURS[number % len(COLOURS)], linestyle=("-", "--", "-.", ":")[number % 4], label=name
        )
    ticks = [4**power for power in range(12) if 4**power <= longest]
    axes.set_xscale("log", base=4)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(0, 1)
    axes.set_xlabel("age in tokens")
    axes.set_ylabel("share of keys that are hit again")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def frontier(series: Mapping[str, Sequence[tuple[float, float, float, float]]], title: str) -> Figure:
    """Loss by footprint; `series`: name -> points (footprint, ΔNLL, and the interval of ΔNLL)."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(series.items()):
        footprint, delta, low, high = np.array(sorted(points)).T
        bars = np.clip(np.stack([delta - low, high - delta]), 0, None)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^vP*"[number % 7], "markersize": 5}
        axes.errorbar(footprint, delta, yerr=bars, label=name, capsize=3, linewidth=1.4, **style)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_xlabel("KV footprint: share of the full cache's keys")
    axes.set_ylabel("ΔNLL against the full cache, nats a token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def contenders_figure(
    series: Mapping[str, tuple[str, Sequence[tuple[float, float, float, float]]]],
    title: str,
    label: str,
    loss: bool = True,
    axis: str = "KV footprint: share of the full cache's keys",
) -> Figure:
    """Contenders by footprint on a log axis; ours and the oracles stand out, rules and nulls stand back.

    Args:
        series: name -> (kind: ours, rule, null, oracle or quantised; points: footprint, figure, and its interval).
        label: of the figure.
        loss: it is a loss, on a log axis; else a share.
        axis: what the footprint is.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = {"ours": ("-", 2.4), "rule": ("-", 1.1), "null": (":", 1.1), "oracle": ("--", 1.4), "quantised": ("", 0)}
    for number, (name, (kind, points)) in enumerate(series.items()):
        footprint, middle, low, high = np.array(sorted(points)).T
        line, width = styles[kind]
        floor = 1e-4 if loss else 0.0
        middle, low, high = (np.clip(values, floor, None) for values in (middle, low, high))
        bars = np.clip(np.stack([middle - low, high - middle]), 0, None)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^vP*X<>"[number % 10], "markersize": 5}
        axes.errorbar(footprint, middle, yerr=bars, label=name, capsize=2, linewidth=width, linestyle=line, **style)
    axes.set_xscale("log", base=2)
    ticks = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    axes.set_xticks(ticks, ["1/32", "1/16", "1/8", "1/4", "1/2", "1"])
    if loss:
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(axis)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
