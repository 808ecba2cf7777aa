"""`python -m eval figures`: the documents' pictures, drawn again from their figures without measuring anything.

Each file `docs/data/<name>.json` becomes `docs/pictures/<name>.png`. It says which page its figures are from, which
command measured them, on what machine, and when they were published. The key `figure` names one of `FIGURES`, the
functions that the measuring commands draw with.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from eval.attention.anchors import NAMES, anchors_picture
from eval.common.architecture_figure import architecture_figure
from eval.common.console import make_console
from eval.common.figures import heads_heatmap, lines_by_layer, predicted_against_true, survival_curves
from eval.common.footprint_figures import DELTA_NLL, Point, contenders_figure, frontier
from eval.common.results import read_result, save_picture
from eval.eviction.compare_report import BYTES
from eval.eviction.gains_figure import GainBar, gains_picture
from eval.eviction.kinds_figure import KindBar, kinds_picture
from eval.gates.report import r2_by_layer_picture
from eval.speed.decode_report import decode_picture
from eval.speed.harvest_report import harvest_picture
from eval.speed.training_report import training_picture
from eval.tasks.heatmaps import panels
from smartkv.errors import SmartKVError
from smartkv.metrics.bootstrap import bootstrap, mean_over

GIB = 2**30
ARCHITECTURE = "architecture"


def figures(data: str = "docs/data", out: str = "docs/pictures", only: list[str] | None = None) -> None:
    """Draw the documents' pictures from the figures that were measured for them.

    Args:
        data: folder of JSON files, one a picture.
        out: folder for the pictures.
        only: names of the pictures to draw. Null: all, and the diagram of the architecture.
    """
    console = make_console()
    files = {path.stem: path for path in sorted(Path(data).glob("*.json"))}
    if not files:
        raise SmartKVError(f"{data} holds no JSON files: expected one for each picture")
    names = [ARCHITECTURE, *files] if only is None else only
    if unknown := [name for name in names if name not in files and name != ARCHITECTURE]:
        raise SmartKVError(f"there is no data for {', '.join(unknown)}: expected {', '.join((ARCHITECTURE, *files))}")
    for name in names:
        figure = architecture_figure() if name == ARCHITECTURE else draw(files[name])
        console.print(f"  {save_picture(figure, Path(out) / f'{name}.png')}", highlight=False)


def draw(path: Path) -> Figure:
    """Draw the picture of one data file.

    Raises:
        SmartKVError: the file names no figure that there is, or lacks something that the figure needs.
    """
    content = read_result(path)
    kind = content.get("figure")
    if kind not in FIGURES:
        raise SmartKVError(f"{path} asks for the figure {kind!r}: expected one of {', '.join(FIGURES)}")
    try:
        return FIGURES[kind](content)
    except KeyError as error:
        raise SmartKVError(f"{path} has no {error}, which the figure '{kind}' needs: add it") from error


def _series(points: Iterable[tuple[dict[str, Any], Point]]) -> dict[str, tuple[str, list[Point]]]:
    """Group points by contender: name -> (kind, points)."""
    series: dict[str, tuple[str, list[Point]]] = {}
    for row, point in points:
        series.setdefault(row["contender"], (row["kind"], []))[1].append(point)
    return series


def _contenders(content: dict[str, Any]) -> Figure:
    points = ((row, (row["footprint"], row["delta_nll"], *row["interval"])) for row in content["rows"])
    return contenders_figure(_series(points), content["title"], DELTA_NLL)


def _bytes(content: dict[str, Any]) -> Figure:
    points = ((row, (row["stored"], row["delta_nll"], *row["interval"])) for row in content["rows"])
    return contenders_figure(_series(points), content["title"], DELTA_NLL, axis=BYTES)


def _recall(content: dict[str, Any]) -> Figure:
    points = []
    for row in content["rows"]:
        right = torch.tensor([1.0] * row["right"] + [0.0] * (row["asked"] - row["right"]), dtype=torch.float64)
        interval = bootstrap(len(right), partial(mean_over, values=right))
        points.append((row, (row["footprint"], float(right.mean()), *interval)))
    return contenders_figure(_series(points), content["title"], "share of facts recalled", loss=False)


def _frontier(content: dict[str, Any]) -> Figure:
    series: dict[str, list[Point]] = {}
    for row in content["rows"]:
        series.setdefault(row["policy"], []).append((row["footprint"], row["delta_nll"], *row["interval"]))
    return frontier(series, content["title"])


def _heads(content: dict[str, Any]) -> Figure:
    values = np.array(content["values"])
    return heads_heatmap(values, range(len(values)), content["title"], content["label"], content["low"])


def _lines(content: dict[str, Any]) -> Figure:
    series, layers = content["series"], range(len(next(iter(content["series"].values()))))
    return lines_by_layer(
        series, layers, content["title"], content["label"], content["log"], contenders=content["contenders"]
    )


def _anchors(content: dict[str, Any]) -> Figure:
    present = [NAMES.index(name) for name in content["classes"]]
    attention, keys = torch.zeros(len(content["attention"]), len(NAMES)), torch.zeros(len(NAMES))
    attention[:, present], keys[present] = torch.tensor(content["attention"]), torch.tensor(content["keys"])
    return anchors_picture(attention, keys, present, content["backbone"])


def _panels(content: dict[str, Any]) -> Figure:
    grids = {name: np.array(grid, dtype=float) for name, grid in content["grids"].items()}
    rows, columns = content["rows"], content["columns"]
    names = (content["names"][0], content["names"][1])
    return panels(grids, rows, columns, names, content["title"], content["label"], content["loss"])


def _in_bytes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "peak_memory": row["peak_memory_gib"] * GIB} for row in rows]


def _training(content: dict[str, Any]) -> Figure:
    heads = [{**row, "steps_per_second": row["head_steps_per_second"] / row["heads"]} for row in content["heads"]]
    return training_picture(content["ways"], _in_bytes(heads))


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "anchors": _anchors,
    "contenders": _contenders,
    "bytes": _bytes,
    "recall": _recall,
    "frontier": _frontier,
    "gains": lambda content: gains_picture([GainBar(**row) for row in content["rows"]]),
    "heads": _heads,
    "kinds": lambda content: kinds_picture([KindBar(**row) for row in content["rows"]]),
    "lines": _lines,
    "panels": _panels,
    "predicted_against_true": lambda content: predicted_against_true(
        {name: np.array(counts) for name, counts in content["panels"].items()}, content["limit"]
    ),
    "survival": lambda content: survival_curves(content["curves"], content["title"]),
    "r2_by_layer": lambda content: r2_by_layer_picture(content["by_layer"], content["layers"]),
    "decode": lambda content: decode_picture(content["rows"]),
    "harvest": lambda content: harvest_picture(_in_bytes(content["rows"])),
    "training": _training,
}
