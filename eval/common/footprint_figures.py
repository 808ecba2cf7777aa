"""Pictures of contenders by the share of the cache that they keep."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.common.contender_styles import ContenderStyle, contender_styles
from eval.common.figures import WIDE, legend_beside, new_figure, styled

Point = tuple[float, float, float, float]  # footprint, figure, lower and upper end of its interval
FOOTPRINT = "KV footprint: share of the full cache's keys"
DELTA_NLL = "ΔNLL against the full cache, nats a token"
LINEAR_BELOW = 1e-3  # nats a token, where an axis of losses shows zero too


@styled
def frontier(series: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """Draw ΔNLL by footprint, both on linear axes.

    Args:
        series: contender -> its points.
        title: of the picture.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for name, style in contender_styles(series).items():
        _draw(axes, style, series[name])
    axes.axhline(0, color="#222222", linewidth=0.9, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_xlabel(FOOTPRINT)
    axes.set_ylabel(DELTA_NLL)
    axes.set_title(title)
    legend_beside(figure, axes)
    return figure


@styled
def contenders_figure(
    series: Mapping[str, tuple[str, Sequence[Point]]],
    title: str,
    label: str,
    loss: bool = True,
    axis: str = FOOTPRINT,
) -> Figure:
    """Draw contenders by footprint on a log axis.

    SmartKV's contenders stand out; nulls and oracles stand back. A quantised contender is a point without a line.

    Args:
        series: contender -> (kind: ours, rule, null, oracle or quantised; its points).
        title: of the picture.
        label: of the vertical axis, with the unit.
        loss: the figure is a loss, on a log axis; else it is a share from 0 to 1. Where an interval of a loss reaches
            0, or comes close to it, the axis is linear below 0.001.
        axis: label of the horizontal axis.
    """
    figure = new_figure((WIDE[0] + 0.8, WIDE[1] + 0.4))
    axes = figure.add_subplot()
    styles = contender_styles(series, {name: kind for name, (kind, _) in series.items()})
    for place, (name, style) in enumerate(styles.items()):
        # shares of a few facts coincide, so that contenders are moved apart by a few percent of their footprint
        shift = 1.0 if loss else 2 ** (0.03 * (place - (len(styles) - 1) / 2))
        _draw(axes, style, series[name][1], shift)
    shown = np.array([point for _, points in series.values() for point in points]).reshape(-1, 4)
    lowest = float(shown[:, 1:].min(initial=1.0))
    _share_axis(axes, shown[:, 0])
    if not loss:
        axes.set_ylim(-0.03, 1.03)
        axis = f"{axis} (points moved apart a little)"
    elif lowest >= LINEAR_BELOW / 10:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.6)
        axes.axhline(0, color="#222222", linewidth=0.9, linestyle=":")
        axes.axhline(LINEAR_BELOW, color="#BBBBBB", linewidth=0.9)
        axes.set_ylim(bottom=min(-LINEAR_BELOW / 2, 1.3 * lowest))
        label = f"{label}\n(linear below {LINEAR_BELOW:g})"
    if loss:
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(axis)
    axes.set_ylabel(label)
    axes.set_title(title)
    legend_beside(figure, axes)
    return figure


def _draw(axes: Axes, style: ContenderStyle, points: Sequence[Point], shift: float = 1.0) -> None:
    """Draw one contender: a line where it has one, and each point with its interval; footprints times `shift`."""
    share, middle, low, high = np.array(sorted(points)).T
    share = share * shift
    bars = np.clip(np.stack([middle - low, high - middle]), 0, None)
    axes.errorbar(
        share, middle, yerr=bars, capsize=2.5, elinewidth=min(max(style.width * 0.6, 0.9), 1.4), **style.plot()
    )


def _share_axis(axes: Axes, shares: np.ndarray) -> None:
    """Show a share of the cache on a log axis, from just below the smallest to 1."""
    axes.set_xscale("log", base=2)
    smallest, largest = float(shares.min(initial=1.0)) / 1.2, float(shares.max(initial=0.0))
    axes.set_xlim(smallest, max(1.0, largest * 1.1) if largest > 0.8 else 1.0)
    denominators = [1, 2, 4, 8, 16, 32, 64, 128]
    ticks = [1 / below for below in denominators if 1 / below >= smallest]
    axes.set_xticks(ticks, ["1" if tick == 1 else f"1/{round(1 / tick)}" for tick in ticks])
    axes.minorticks_off()
