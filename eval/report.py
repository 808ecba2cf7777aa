"""`python -m eval report`: one file with the figures of a run from calibration to perplexity."""

from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.common.console import make_console
from eval.common.results import read_result, write_result
from eval.eviction.frontier import frontier_table, read_points, summary_line
from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import window_nll
from smartkv.models.backbone import load_backbone
from smartkv.shards.manifest import Manifest
from smartkv.texts.windows import read_plan


def report(run: str, out: str, score_from: int = 512, device: str = "cpu", reuse: bool = False) -> None:
    """Write report.json from the folder of a run, and show it.

    Args:
        run: folder with calibrate/, shards/, gates/export/, scores/ and perplexity/ as `make demo` leaves them.
        out: folder for report.json.
        score_from: the frozen model's NLL is taken over the tokens of each validation window from this one on.
        device: cpu or cuda.
        reuse: show the report.json that is there instead of making it anew.
    """
    console, folder = make_console(), Path(run)
    path = Path(out) / "report.json"
    if not (reuse and path.exists()):
        manifest = Manifest.read(folder / "shards")
        scores = read_result(folder / "scores" / "gates.json")
        if scores["r2_mean"] is None:
            raise SmartKVError(
                f"the gates in {folder / 'gates'} have no R² to report: measure them with `python -m eval compare`"
            )
        lm = load_backbone(manifest.arguments["backbone"], manifest.arguments["dtype"], device)
        windows = read_plan(folder / "shards").of_split("validation")
        nll = [window_nll(lm.model, w, score_from) for w in track(windows, "Frozen model", console=console)]
        points = read_points(folder / "perplexity")
        names = ("heads", "r2_mean", "r2_mean_interval_95", "r2_median", "r2_token_table", "r2_nulls")
        write_result(
            Path(out),
            "report",
            {"run": run, "score_from": score_from, "seed": manifest.arguments["seed"]},
            {
                "model": manifest.arguments["backbone"],
                "texts": manifest.sources,
                "tokens_harvested": sum(shard.tokens for shard in manifest.shards),
                **{name: scores[name] for name in names},
                "nll_full": sum(nll) / len(nll),
                "nll_unit": f"nats a token, validation windows of {manifest.window} tokens, from token {score_from} on",
                "gates": str(folder / "gates" / "export"),
                "frontier": [{name: getattr(point, name) for name in FRONTIER} for point in points],
            },
        )
    _show(console, folder, path)


FRONTIER = ("policy", "footprint", "delta_nll", "peak_bytes", "peak_bytes_full")


def _show(console: Console, folder: Path, path: Path) -> None:
    content, scores = read_result(path), read_result(folder / "scores" / "gates.json")
    columns = {"gates": scores["r2_head"], **scores["r2_head_nulls"]}
    layers: dict[str, dict[str, list[float]]] = {}
    for column, heads in columns.items():
        for head, value in heads.items():
            layers.setdefault(head[1:3], {}).setdefault(column, []).append(value)
    table = Table(title=f"{content['model']}: R² of log4 lifespan on validation text, mean over KV heads")
    for column in ("layer", *columns):
        table.add_column(column.replace("_", " "), justify="right")
    for layer, values in layers.items():
        table.add_row(str(int(layer)), *(f"{sum(v) / len(v):.3f}" for v in values.values()))
    table.add_section()
    table.add_row("mean", f"{scores['r2_mean']:.3f}", *(f"{v:.3f}" for v in scores["r2_nulls"].values()))
    console.print(table)
    low, high = content["r2_mean_interval_95"]
    texts = ", ".join(f"{source['name']} ({source['origin']})" for source in content["texts"])
    console.print(f"texts: {texts}; {content['tokens_harvested']:,} tokens harvested for {content['heads']} heads")
    console.print(
        f"mean R² {content['r2_mean']:.3f} (95 % over windows {low:.3f} to {high:.3f}), "
        f"median {content['r2_median']:.3f}, token-id table {content['r2_token_table']:.3f}; "
        f"frozen model {content['nll_full']:.3f} nats a token",
        highlight=False,
    )
    console.print(f"gates: {content['gates']}\nreport: {path}", highlight=False)
    console.print("pictures:")
    for picture in sorted(
        path for part in ("calibrate", "scores", "perplexity") for path in folder.glob(f"{part}/*.png")
    ):
        console.print(f"  {picture}", highlight=False)
    console.print(f"curves: tensorboard --logdir {folder}", highlight=False)
    points = read_points(folder / "perplexity")
    if points:
        console.print(
            frontier_table(points, "What is lost when keys are evicted, by share of the KV cache that is kept")
        )
        console.print(summary_line(points), highlight=False)
