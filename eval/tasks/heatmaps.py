"""Heatmaps of tasks: a panel for each contender, a cell for each group of samples."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from eval.common.contender_styles import contender_label
from eval.common.figures import new_figure, styled, write_cells


@styled
def panels(
    grids: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str],
    title: str,
    label: str,
    loss: bool = False,
) -> Figure:
    """Draw heatmaps side by side with one colour scale.

    Args:
        grids: name of a panel -> its values `[rows, columns]`; NaN: not measured. A contender's name is written out.
        rows: names of the rows; a contender's name is written out.
        columns: names of the columns.
        names: names of the vertical and the horizontal axis.
        title: of the figure.
        label: of the colour scale, with the unit.
        loss: less is better: the scale goes from 0 to the largest value in place of 1.
    """
    across = min(3, len(grids))
    down = -(-len(grids) // across)
    row_names, column_names = [contender_label(name) for name in rows], [name.replace("_", " ") for name in columns]
    widest = max(map(len, row_names), default=0)
    panel = max(2.3, 0.62 * len(columns) + 0.5), max(1.9, 0.34 * len(rows) + 0.9)
    figure = new_figure((1.6 + 0.07 * widest + across * panel[0], 0.6 + down * panel[1]))
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()] or [np.zeros(1)])
    top = max(float(finite.max(initial=0.0)), 1e-6) if loss else 1.0
    image = None
    for axis in axes.flat[len(grids) :]:
        axis.set_axis_off()
    for place, (axis, (name, grid)) in enumerate(zip(axes.flat, grids.items(), strict=False)):
        image = axis.imshow(grid, aspect="auto", cmap="viridis_r" if loss else "viridis", vmin=0, vmax=top)
        write_cells(axis, grid, top / 2, dark_above=loss, size=7.5)
        slanted = max(map(len, column_names), default=0) > 6
        axis.set_xticks(
            range(len(columns)), column_names, rotation=30 if slanted else 0, ha="right" if slanted else "center"
        )
        axis.set_yticks(range(len(rows)), row_names)
        axis.grid(False)
        if len(grids) > 1:
            axis.set_title(contender_label(name), fontsize=10)
        if place % across == 0:
            axis.set_ylabel(names[0])
        if place + across >= len(grids):
            axis.set_xlabel(names[1])
    if image is not None:
        figure.colorbar(image, ax=axes, label=label, pad=0.01, aspect=14 * down)
    figure.suptitle(title)
    return figure
