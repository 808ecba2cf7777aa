"""`python -m eval gates`: R² of exported gates on validation windows, beside the nulls."""

from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from torch import Tensor

from callbacks.console import make_console
from callbacks.pictures import heads_heatmap, lines_by_layer, predicted_against_true
from eval.results import save_picture, write_result
from lightning_modules.gates import head_name
from smartkv.errors import SmartKVError
from smartkv.gates import GateBank, format_layers
from smartkv.nulls import NULLS, score_nulls
from smartkv.objectives import Log4Lifespan, OrdinalAges
from smartkv.rows import LabelledRows
from smartkv.scores import RegressionSums, bootstrap
from smartkv.shards import Manifest


@torch.inference_mode()
def gates(
    gates: str,
    shards: str,
    out: str,
    threshold: float | None = None,
    inputs: Literal["keys", "keys_post_rope"] | None = None,
    device: str = "cpu",
) -> None:
    """Score exported gates on the validation windows of harvested shards.

    Args:
        gates: folder of exported gates, or hub id.
        shards: folder that a harvest made; its train windows teach the nulls.
        out: folder for gates.json and the pictures.
        threshold: attention probability that counts as a hit. Null: what the gates were trained for.
        inputs: keys or keys_post_rope. Null: what the gates were trained on.
        device: cpu or cuda.
    """
    console = make_console()
    bank = GateBank.from_pretrained(gates).to(device)
    target = bank.details.get("target", Log4Lifespan.target)
    if target not in (Log4Lifespan.target, OrdinalAges.target):
        raise SmartKVError(f"the gates in {gates} predict {target}, which has no R²: measure them by eval perplexity")
    manifest = Manifest.read(shards)
    manifest.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
    rows = LabelledRows(
        manifest,
        bank.details.get("threshold", 0.05) if threshold is None else threshold,
        bank.details.get("follow_up"),
        inputs or bank.details.get("inputs", "keys"),
        format_layers(bank.layers),
    )
    blocks = rows.blocks("validation")
    sums = RegressionSums.zeros(len(blocks), len(bank))
    drawn: list[tuple[Tensor, Tensor]] = []
    for window, block in enumerate(track(blocks, "Scoring gates", console=console)):
        prediction = bank.read(bank(rows.checked_keys(block).to(device).float())).cpu()
        sums.update(window, prediction, rows.target(block))
        if window < 8:
            drawn.append((prediction, rows.target(block)))
    nulls = score_nulls(rows)
    table_gap = _gap_interval(sums, nulls["token_table"])
    r2, interval = sums.r2(), sums.interval()

    names = [head_name(*head) for head in bank.heads]
    null_r2 = {name: nulls[name].r2() for name in NULLS}
    folder = Path(out)
    result = write_result(
        folder,
        "gates",
        {"gates": gates, "shards": shards, "threshold": rows.threshold, "inputs": rows.inputs},
        {
            "model": manifest.arguments["backbone"],
            "texts": manifest.sources,
            "follow_up": rows.follow_up,
            "validation_windows": len(blocks),
            "validation_keys_a_head": int(sums.count.sum()),
            "train_keys_a_head": sum(b.stop - b.start for b in rows.blocks("train")),
            "heads": len(bank),
            "r2_mean": float(r2.nanmean()),
            "r2_mean_interval_95": list(interval),
            "r2_median": float(r2.nanmedian()),
            "r2_token_table": float(null_r2["token_table"].nanmean()),
            "r2_above_token_table": float(r2.nanmean() - null_r2["token_table"].nanmean()),
            "r2_above_token_table_interval_95": list(table_gap),
            "r2_nulls": {name: float(value.nanmean()) for name, value in null_r2.items()},
            "r2_head": dict(zip(names, r2.tolist(), strict=True)),
            "r2_head_nulls": {n: dict(zip(names, v.tolist(), strict=True)) for n, v in null_r2.items()},
        },
    )
    by_layer = {"gates": r2, **null_r2}
    by_layer = {name: v.view(len(bank.layers), -1).nanmean(dim=1).tolist() for name, v in by_layer.items()}
    grid = r2.view(len(bank.layers), -1).numpy()
    title = f"R² by head on {len(blocks)} validation windows, mean {r2.nanmean():.3f}"
    shown = {
        "gates": by_layer["gates"],
        "null: token-id table": by_layer["token_table"],
        "null: position": by_layer["position"],
        "null: constant": by_layer["constant"],
    }
    pictures = [
        save_picture(heads_heatmap(grid, bank.layers, title, "R²"), folder / "r2_by_head.png"),
        save_picture(
            lines_by_layer(shown, bank.layers, "R² by layer: gates beside their nulls", "R² (mean over KV heads)"),
            folder / "r2_by_layer.png",
        ),
        save_picture(_histograms(drawn, r2, names, rows.follow_up), folder / "predicted_against_true.png"),
    ]
    console.print(_table(by_layer, bank.layers, {"gates": r2, **null_r2}))
    console.print(
        f"mean R² {r2.nanmean():.3f} (95 % over windows: {interval[0]:.3f} to {interval[1]:.3f}), "
        f"{r2.nanmean() - null_r2['token_table'].nanmean():+.3f} against the token-id table "
        f"({table_gap[0]:+.3f} to {table_gap[1]:+.3f}); {len(bank)} heads, {len(blocks)} windows"
    )
    for path in [result, *pictures]:
        console.print(f"  {path}", highlight=False)


def _gap_interval(gates: RegressionSums, table: RegressionSums) -> tuple[float, float]:
    """95 % bootstrap interval over windows of the difference of the mean R²."""
    return bootstrap(len(gates.count), lambda w: (gates.r2(w) - table.r2(w)).nanmean(dim=-1))


def _histograms(drawn: list[tuple[Tensor, Tensor]], r2: Tensor, names: list[str], follow_up: int) -> Figure:
    prediction, truth = (torch.cat(parts, dim=1).numpy() for parts in zip(*drawn, strict=True))
    order = r2.nan_to_num(-1).argsort().tolist()
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    panels = {f"{k}: {names[g]}, R² {r2[g]:.2f}": (prediction[g], truth[g]) for k, g in chosen.items()}
    return predicted_against_true(panels, torch.tensor(float(follow_up)).log2().item() / 2)


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
