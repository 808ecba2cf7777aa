"""`python -m eval gates`: R² and order of exported gates on validation windows, beside the nulls."""

from pathlib import Path
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor

from eval.common.console import make_console
from eval.common.results import save_picture, write_result
from eval.gates.ranking import MEANING, RankingScores
from eval.gates.report import calibration, order_table, print_r2, r2_figures, r2_pictures, reliability_picture
from smartkv.gates.bank import GateBank, head_name
from smartkv.gates.objectives import Log4Lifespan, OrdinalAges, objective_of_target
from smartkv.metrics.nulls import score_nulls
from smartkv.metrics.r2 import RegressionSums
from smartkv.metrics.ranking import Reliability
from smartkv.models.layer_ranges import format_layers
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest


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
    objective = objective_of_target(target, bank.details.get("objective", {}))
    in_log4 = target == Log4Lifespan.target or (objective is not None and objective.in_log4)
    manifest = Manifest.read(shards)
    manifest.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
    rows = LabelledKeys(
        manifest,
        bank.details.get("threshold", 0.05) if threshold is None else threshold,
        bank.details.get("follow_up"),
        inputs or bank.details.get("inputs", "keys"),
        format_layers(bank.layers),
    )
    manifest.verify(manifest.of_split("validation"))
    blocks = rows.blocks("validation")
    sums, orders = RegressionSums.zeros(len(blocks), len(bank)), RankingScores(rows)
    reliability = Reliability.zeros(bank.outputs) if isinstance(objective, OrdinalAges) else None
    drawn: list[tuple[Tensor, Tensor]] = []
    for window, block in enumerate(track(blocks, "Scoring gates", console=console)):
        output = bank(rows.checked_keys(block).to(device).float()).cpu()
        prediction = bank.single_score(bank.read(output))
        sums.update(window, prediction, rows.target(block))
        orders.note("gates", window, prediction, block)
        orders.oracle(window, block)
        if reliability is not None and isinstance(objective, OrdinalAges):
            reliability.update(output.sigmoid(), objective.targets(rows.labels(block)))
        if window < 8:
            drawn.append((prediction, rows.target(block)))
    nulls = score_nulls(rows, orders.note)
    folder = Path(out)
    figures = {
        "model": manifest.arguments["backbone"],
        "texts": manifest.sources,
        "follow_up": rows.follow_up,
        "validation_windows": len(blocks),
        "validation_keys_a_head": int(sums.count.sum()),
        "train_keys_a_head": sum(b.stop - b.start for b in rows.blocks("train")),
        "heads": len(bank),
        "target": target,
        "order": {"future_attention_from_age": orders.age, "meaning": MEANING, "scores": orders.summary()},
        "calibration": None if reliability is None else calibration(reliability, bank.details["objective"]["ages"]),
        **(r2_figures(sums, nulls, [head_name(*head) for head in bank.heads]) if in_log4 else {"r2_mean": None}),
    }
    settings = {"gates": gates, "shards": shards, "threshold": rows.threshold, "inputs": rows.inputs}
    result = write_result(folder, "gates", settings, figures)
    pictures = []
    if in_log4:
        pictures = r2_pictures(folder, bank, sums, nulls, drawn, rows.follow_up)
        print_r2(console, bank, figures, sums, nulls)
    if reliability is not None:
        pictures.append(save_picture(reliability_picture(figures["calibration"]), folder / "calibration.png"))
    console.print(order_table(figures["order"]))
    for path in [result, *pictures]:
        console.print(f"  {path}", highlight=False)
