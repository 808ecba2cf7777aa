"""The style that all pictures share, and the pictures of values by layer and head.

Every function that draws is wrapped by `styled`, so that size, fonts, resolution and grid are the same everywhere.
Contenders have their label, colour and marker from `eval.common.contender_styles`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import matplotlib.cm
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.common.contender_styles import COLOURS, MARKERS, ContenderStyle, contender_styles

DPI = 150
WIDE = (9.0, 4.6)  # inches, of a picture with its legend beside the axes
PANEL = (4.6, 3.9)  # inches, of one of several axes side by side
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.alpha": 0.6,
    "grid.color": "#DDDDDD",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
Parameters = ParamSpec("Parameters")
Drawn = TypeVar("Drawn")


def styled(draw: Callable[Parameters, Drawn]) -> Callable[Parameters, Drawn]:
    """Wrap a function that draws, so that what it draws has the common style."""

    @functools.wraps(draw)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Drawn:
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # known keys, of a plain dict
            result = draw(*args, **kwargs)
            if isinstance(result, Figure):
                result.draw_without_rendering()  # ticks are made when they are first drawn, in the style of that moment
            return result

    return drawn


def new_figure(size: tuple[float, float] = WIDE) -> Figure:
    """Return an empty figure whose layout keeps labels and legends apart; `size` in inches."""
    return Figure(figsize=size, layout="constrained")


def series_style(number: int) -> dict[str, Any]:
    """Return colour and marker of the `number`-th of several series that are no contenders."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def legend_beside(figure: Figure, axes: Axes, **options: Any) -> None:
    """Put one legend at the right of all axes, with each label once."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(list(unique.values()), list(unique), loc="outside right upper", **options)


@styled
def heads_heatmap(
    values: np.ndarray,
    layers: Sequence[int],
    title: str,
    label: str,
    low: float = 0.0,
    columns: Sequence[str] | None = None,
    column_label: str = "KV head",
) -> Figure:
    """Draw `values` `[layers, kv_heads]` as a heatmap: layers from left to right, heads from top to bottom.

    Args:
        values: one figure a layer and head; NaN cells stay empty.
        layers: the number of each layer.
        title: of the picture.
        label: of the colour scale, with the unit.
        low: value of the darkest colour.
        columns: names of the second axis of `values`. None: numbers from 0 on.
        column_label: what the second axis is.
    """
    count, heads = values.shape
    figure = new_figure((min(max(5.0, 2.0 + 0.34 * count), 20.0), max(2.3, 1.3 + 0.34 * heads)))
    axes = figure.add_subplot()
    high = max(float(np.nanmax(values)) if np.isfinite(values).any() else low, low + 1e-6)
    image = axes.imshow(values.T, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    if heads <= 16 and count <= 52:  # else a figure does not fit into its cell
        write_cells(axes, values.T, (low + high) / 2)
    axes.set_xticks(range(count), [str(layer) for layer in layers], fontsize=8)
    axes.set_yticks(range(heads), [str(head) for head in range(heads)] if columns is None else list(columns))
    axes.set_xlabel("layer")
    axes.set_ylabel(column_label)
    axes.grid(False)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=label, pad=0.01, aspect=12)
    return figure


def write_cells(axes: Axes, values: np.ndarray, middle: float, dark_above: bool = False, size: float = 6.5) -> None:
    """Write each finite value `[rows, columns]` into its cell of a heatmap.

    Args:
        axes: with the heatmap.
        values: as the heatmap shows them.
        middle: value at which the letters change from white to black.
        dark_above: values above `middle` are the dark ones.
        size: of the letters, in points.
    """
    decimals = 2 if np.nanmax(np.abs(values), initial=0.0) < 10 else 0
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        text = f"{value:.{decimals}f}"
        if float(text) == 0:
            text = text.removeprefix("-")
        dark = value > middle if dark_above else value < middle
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")


def lifespan_histogram(prediction: np.ndarray, truth: np.ndarray, limit: float, bins: int = 40) -> np.ndarray:
    """Return how many keys have each true and predicted value, int64 `[bins true, bins predicted]` from 0 to `limit`.

    Args:
        prediction: of each key, any shape; what lies outside is counted at the border.
        truth: of the same shape.
        limit: largest value, such as the log4 of the follow-up.
        bins: along each axis.
    """
    edges = np.linspace(0, limit, bins + 1)
    counts, _, _ = np.histogram2d(truth.ravel(), np.clip(prediction, 0, limit).ravel(), bins=(edges, edges))
    return counts.astype(np.int64)


@styled
def predicted_against_true(panels: Mapping[str, np.ndarray], limit: float, unit: str = "log4 lifespan") -> Figure:
    """Draw histograms of prediction against truth, one a named head, with one colour scale; empty cells are white.

    Args:
        panels: title -> counts `[bins true, bins predicted]` as `lifespan_histogram` returns them.
        limit: largest value of both axes.
        unit: of both axes.
    """
    figure = new_figure((PANEL[0] * len(panels) * 0.8 + 0.8, PANEL[1]))
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    most = max(int(counts.max()) for counts in panels.values())
    norm = matplotlib.colors.LogNorm(1, max(most, 2))
    blues = matplotlib.colors.ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 256)))
    for axes, (name, counts) in zip(all_axes, panels.items(), strict=True):
        edges = np.linspace(0, limit, len(counts) + 1)
        shown = np.ma.masked_equal(counts.T, 0)
        axes.pcolormesh(edges, edges, shown, cmap=blues, norm=norm, rasterized=True)
        axes.plot([0, limit], [0, limit], color="#444444", linewidth=0.9, linestyle="--")
        axes.set_aspect("equal")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"true {unit}")
    all_axes[0].set_ylabel(f"predicted {unit}")
    scale = matplotlib.cm.ScalarMappable(norm, blues)
    figure.colorbar(scale, ax=all_axes, label="keys a cell", pad=0.01)
    return figure


@styled
def lines_by_layer(
    series: Mapping[str, Sequence[float]],
    layers: Sequence[int],
    title: str,
    label: str,
    log: bool = False,
    contenders: bool = False,
) -> Figure:
    """Draw one line a series over the layers.

    Args:
        series: name -> one value a layer.
        layers: the number of each layer.
        title: of the picture.
        label: of the vertical axis, with the unit.
        log: the vertical axis is logarithmic.
        contenders: the names are contenders, optionally with a footprint after a space, and have their styles.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    styles: dict[str, ContenderStyle] = contender_styles(series) if contenders else {}
    for number, (name, values) in enumerate(series.items()):
        style = styles[name].plot() if contenders else {"label": name, "linewidth": 1.4, **series_style(number)}
        axes.plot(layers, values, **{**style, "markersize": 4})
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.set_title(title)
    legend_beside(figure, axes)
    return figure


def survival(series: Mapping[str, np.ndarray], longest: int, title: str) -> Figure:
    """Draw the share of keys that are hit again after each age.

    Args:
        series: name -> lifespans in tokens, any shape.
        longest: last age, in tokens.
        title: of the picture.
    """
    ages = np.unique(np.geomspace(1, longest, 80).astype(int))
    curves = {name: [(int(age), float((lifespans > age).mean())) for age in ages] for name, lifespans in series.items()}
    return survival_curves(curves, title)


@styled
def survival_curves(curves: Mapping[str, Sequence[tuple[int, float]]], title: str) -> Figure:
    """Draw curves of (age in tokens, share of keys that are hit again); `curves` by name."""
    figure = new_figure()
    axes = figure.add_subplot()
    longest = max(age for points in curves.values() for age, _ in points)
    for number, (name, points) in enumerate(curves.items()):
        ages, alive = zip(*points, strict=True)
        line = ("-", "--", "-.", ":")[number % 4]
        axes.plot(ages, alive, color=COLOURS[number % len(COLOURS)], linestyle=line, linewidth=1.8, label=name)
    ticks = [4**power for power in range(12) if 4**power <= longest]
    axes.set_xscale("log", base=4)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(0, 1)
    axes.set_xlabel("age, tokens")
    axes.set_ylabel("share of keys that are hit again")
    axes.set_title(title)
    legend_beside(figure, axes)
    return figure
