"""Pictures of tasks: a panel for each contender, a cell for each group of samples."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure


def panels(
    grids: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str],
    title: str,
    label: str,
    loss: bool = False,
) -> Figure:
    """Heatmaps side by side, with one colour scale.

    Args:
        grids: name -> `[rows, columns]`; NaN where nothing was measured.
        names: of rows and columns.
        label: of the figure in the cells.
        loss: less is better: colours the other way round, from 0 to the largest; else from 0 to 1.
    """
    across = min(3, len(grids))
    down = -(-len(grids) // across)
    size = (1.2 + across * max(2.0, 0.55 * len(columns) + 0.6), 1.1 + down * max(1.4, 0.26 * len(rows) + 0.7))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()] or [np.zeros(1)])
    top = max(float(finite.max(initial=0.0)), 1e-6) if loss else 1.0
    image = None
    for place, axis in enumerate(axes.flat):
        if place >= len(grids):
            axis.set_axis_off()
            continue
        name, grid = list(grids.items())[place]
        image = axis.imshow(grid, aspect="auto", cmap="viridis_r" if loss else "viridis", vmin=0, vmax=top)
        for row, column in np.argwhere(np.isfinite(grid)):
            dark = (grid[row, column] > top / 2) if loss else (grid[row, column] < 0.5)
            text = f"{grid[row, column]:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
        axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=30 if max(map(len, columns)) > 6 else 0)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.set_title(name, fontsize=8)
        if place % across == 0:
            axis.set_ylabel(names[0], fontsize=8)
        if place + across >= len(grids):
            axis.set_xlabel(names[1], fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(title, fontsize=10)
    return figure
