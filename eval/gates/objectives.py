"""`python -m eval objectives`: gates of several objectives or thresholds, side by side."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from eval.common.console import make_console
from eval.common.contender_styles import COLOURS
from eval.common.figures import lines_by_layer, new_figure, styled
from eval.common.results import read_result, save_picture, write_result, write_tables
from eval.eviction.frontier import loss_at, read_points
from eval.gates.ranking import ORACLE
from smartkv.errors import SmartKVError

ORDER = ("concordance", "top_10", "top_25", "top_10_all", "top_25_all")
NAMES = {
    "r2_mean": "R²",
    "concordance": "pairs in order",
    "top_10": "top 10 % by head",
    "top_25": "top 25 % by head",
    "top_10_all": "top 10 % of all",
    "top_25_all": "top 25 % of all",
}


def objectives(
    runs: dict[str, str],
    out: str,
    footprints: list[float] = [0.125, 0.25],  # noqa: B006 - jsonargparse shows it; never changed
    nulls: list[str] = ["token_table", "constant", "random", "oracle"],  # noqa: B006
) -> None:
    """Compare several gates by the results of `eval gates` and, where there are any, of `eval perplexity`.

    Args:
        runs: name and folder of each: `gates.json` of `eval gates` in it or in its `scores`, and `perplexity.json` of
            `eval perplexity` in it or in its `perplexity`, if the frontier is to be shown.
        out: folder for objectives.json and the pictures.
        footprints: at which the loss is read off the frontier, between measured points.
        nulls: that stand in the table too, as the first of the runs has them.
    """
    console = make_console()
    if not runs:
        raise SmartKVError("there is nothing to compare: give --runs, a name and a folder each")
    results = {name: _figures(Path(folder), footprints) for name, folder in runs.items()}
    first = next(iter(results.values()))
    for name in nulls:
        if name not in first["scores"]:
            raise SmartKVError(f"there is no null '{name}' beside the gates: expected {', '.join(first['scores'])}")
    beside = {name: {"r2_mean": first["r2_nulls"].get(name), **_means(first["scores"][name])} for name in nulls}
    folder = Path(out)
    rows = {name: result["figures"] for name, result in results.items()} | {
        name if name == ORACLE else f"null: {name.replace('_', ' ')}": row for name, row in beside.items()
    }
    path = write_result(folder, "objectives", {"runs": runs, "footprints": footprints}, {"rows": rows, "units": UNITS})
    pictures = [save_picture(_bars(rows), folder / "order.png")]
    tables = [_table(rows, footprints)]
    layers = {name: result["r2_by_layer"] for name, result in results.items() if result["r2_by_layer"]}
    if layers:
        count = len(next(iter(layers.values())))
        title = "R² by layer, each with its own labels"
        figure = lines_by_layer(layers, range(count), title, "R² (mean over KV heads)")
        pictures.append(save_picture(figure, folder / "r2_by_layer.png"))
        tables.append(_layers(layers))
    for table in tables:
        console.print(table)
    for written in [path, write_tables(folder / "objectives.md", tables), *pictures]:
        console.print(f"  {written}", highlight=False)


UNITS = {
    "r2_mean": "of log4 lifespan, mean over heads",
    "concordance": "share of pairs of keys of a head with different lifespans that are in order",
    "top_…": "share of future attention held by the top keys, of each head or of all by one price",
    "delta_nll": "nats a token above the full cache, by footprint",
}


def _there(folder: Path, inner: str, name: str) -> Path | None:
    """Return the folder that holds `<name>.json`: `folder` itself or `inner` in it. None: neither does."""
    return next((place for place in (folder, folder / inner) if (place / f"{name}.json").is_file()), None)


def _figures(folder: Path, footprints: list[float]) -> dict[str, Any]:
    place = _there(folder, "scores", "gates")
    if place is None:
        raise SmartKVError(f"{folder} has no gates.json, neither has {folder / 'scores'}: run `eval gates` first")
    scores = read_result(place / "gates.json")
    order = scores["order"]["scores"]
    figures: dict[str, Any] = {"r2_mean": scores["r2_mean"], **_means(order["gates"])}
    measured = _there(folder, "perplexity", "perplexity")
    if measured is not None:
        points = [point for point in read_points(measured) if point.policy != "window"]
        figures["delta_nll"] = {str(footprint): loss_at(footprint, points) for footprint in footprints}
    by_layer: dict[str, list[float]] = {}
    for name, value in scores.get("r2_head", {}).items():
        by_layer.setdefault(name.partition("H")[0], []).append(value)
    return {
        "figures": figures,
        "scores": order,
        "r2_nulls": scores.get("r2_nulls", {}),
        "r2_by_layer": [sum(values) / len(values) for values in by_layer.values()],
    }


def _means(order: dict[str, Any]) -> dict[str, float]:
    return {name: order[name]["mean"] for name in ORDER if name in order}


def _table(rows: dict[str, Any], footprints: list[float]) -> Table:
    table = Table(title="objectives on the same validation windows")
    table.add_column("gates")
    for name in NAMES.values():
        table.add_column(name, justify="right")
    frontier = any("delta_nll" in row for row in rows.values())
    for footprint in footprints if frontier else []:
        table.add_column(f"ΔNLL at {footprint:g}", justify="right")
    for name, row in rows.items():
        figures = [_shown(row.get(figure)) for figure in NAMES]
        losses = [_shown(row.get("delta_nll", {}).get(str(f)), "{:+.4f}") for f in footprints] if frontier else []
        table.add_row(name, *figures, *losses)
    return table


def _shown(value: float | None, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(value)


def _layers(layers: dict[str, list[float]]) -> Table:
    table = Table(title="R² by layer, mean over KV heads")
    table.add_column("layer", justify="right")
    for name in layers:
        table.add_column(name, justify="right")
    for place in range(len(next(iter(layers.values())))):
        table.add_row(str(place), *(f"{values[place]:.3f}" for values in layers.values()))
    return table


@styled
def _bars(rows: dict[str, Any]) -> Figure:
    """Draw the future attention held by the top keys of all heads, and the share of pairs in order."""
    shown = [name for name in ("top_10_all", "top_25_all", "concordance") if any(name in row for row in rows.values())]
    figure = new_figure((8.0, 1.5 + 0.45 * len(rows)))
    axes, height = figure.add_subplot(), 0.8 / len(shown)
    for number, name in enumerate(shown):
        bars = {place + number * height: row[name] for place, row in enumerate(rows.values()) if row.get(name)}
        axes.barh(list(bars), list(bars.values()), height * 0.9, label=NAMES[name], color=COLOURS[number])
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share (of future attention; of pairs of keys)")
    axes.set_title("What the highest scores hold")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
