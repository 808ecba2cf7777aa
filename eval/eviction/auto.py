"""`python -m eval auto`: chooses the windows of a policy layer by layer, from data."""

from pathlib import Path

import yaml
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from eval.common.console import make_console
from eval.common.figures import heads_heatmap
from eval.common.options import Measure, Model
from eval.common.results import save_picture, write_result
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.atomic import write_atomically
from smartkv.labels.lifespans import check_window
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policy_search import Trade, auto_policy, measure_trade
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

NEARBY = 0.15  # the worth of cache is measured between footprints this share below and above the target


def auto(
    out: str,
    gates: str,
    footprint: float = 0.2,
    windows: list[int] = [4, 16, 64, 128],  # noqa: B006 - jsonargparse shows it; never changed
    start: int = 16,
    local: bool = True,
    sources: list[SourceConfig] = [SourceConfig("pg19")],  # noqa: B006, B008
    texts: int = 4,
    measure: Measure = Measure(window=1024, score_from=256),  # noqa: B008
    model: Model = Model(),  # noqa: B008
) -> None:
    """Choose each layer's window, and whether it asks its gates, for a target footprint.

    Args:
        out: folder for auto.yaml (the policy), auto.json and the picture.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV.
        footprint: share of the full cache to keep.
        windows: window sizes to choose from, in tokens.
        start: window size of all other layers while a size is tried in one layer.
        local: a layer may also do without gates and keep recent keys only.
        sources: the texts, train split.
        texts: number of windows.
        measure: which tokens are read, and from which on their queries count.
        model: the frozen language model.
    """
    console = make_console()
    if start not in windows or min(windows) < 1:
        raise SmartKVError(f"windows must be at least 1 token each and contain start, got {windows} and {start}")
    if texts < 1 or not 1 <= measure.score_from < measure.window - 1:
        raise SmartKVError("texts must be at least 1, and score_from at least 1 and below the window by 2 or more")
    lm = model.load()
    check_window(lm.model, measure.window)
    bank = GateBank.from_pretrained(gates, lm.model).to(model.device)
    plan = plan_windows(
        sources,
        {"train": texts},
        lm.tokenizer,
        measure.window,
        measure.windows_per_document,
        measure.seed,
        console.print,
    )
    learn = list(plan.of_split("train"))
    calibration = Calibration.measure(lm.model, bank, learn, measure.score_from)
    sizes = sorted(set(windows))
    options = [LayerRule("all", "gated", size) for size in sizes]
    if local:
        options += [LayerRule("all", "window", size) for size in sizes]
    base = HybridPolicy((LayerRule("all", "gated", start),), name="all-gated")
    policy = solve(base, footprint, calibration)
    nearby = [solve(base, footprint * factor, calibration) for factor in (1 - NEARBY, 1 + NEARBY)]
    trade = measure_trade(
        lm.model,
        bank,
        policy,
        nearby,
        options,
        learn,
        measure.score_from,
        lambda layers: track(list(layers), "Layers", console=console),
    )
    chosen = auto_policy(trade, policy, footprint, calibration)
    folder = Path(out)
    settings = {"gates": gates, "backbone": model.backbone, "footprint": footprint, "texts": plan.sources}
    settings |= {"window": measure.window, "windows": sizes, "start": start}
    settings |= {"score_from": measure.score_from, "seed": measure.seed}
    figures = {
        "units": {
            "divergence": "nats a token from the full cache, one layer changed",
            "footprint": "of the layer",
            "rate": "nats a token for the whole cache",
        },
        "options": [f"{option.rule} {option.window}" for option in trade.options],
        "divergence": trade.divergence.tolist(),
        "footprint": trade.footprint.tolist(),
        "rate": trade.rate,
        "policy": chosen.to_dict(),
    }
    result = write_result(folder, "auto", settings, figures)
    left_open = {**chosen.to_dict(), "price": None} if chosen.gated else chosen.to_dict()
    write_atomically(folder / "auto.yaml", yaml.safe_dump(left_open, sort_keys=False).encode())
    picture = save_picture(_picture(trade), folder / "auto.png")
    console.print(_table(chosen))
    for path in [folder / "auto.yaml", result, picture]:
        console.print(f"  {path}", highlight=False)


def _table(policy: HybridPolicy) -> Table:
    table = Table(title="rules that were chosen")
    for name in ("rule", "window", "layers"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for rule in policy.rules:
        table.add_row(rule.rule, str(rule.window), rule.layers)
    return table


def _picture(trade: Trade) -> Figure:
    """Draw how much more each option costs a layer than the layer's cheapest."""
    above = trade.divergence - trade.divergence.amin(dim=1, keepdim=True)
    return heads_heatmap(
        (above * 1000).numpy(),
        range(len(above)),
        "Divergence above the layer's best option",
        "thousandths of a nat a token",
        columns=[f"{option.rule} {option.window}" for option in trade.options],
        column_label="rule and window",
    )
