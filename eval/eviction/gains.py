"""`python -m eval gains`: compares results of `eval compare` before and after a training, window by window."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.common.console import make_console
from eval.common.results import read_result, save_picture, write_result, write_tables
from eval.eviction.gains_figure import GainBar, gains_picture
from smartkv.errors import SmartKVError
from smartkv.metrics.bootstrap import bootstrap

# settings that must be equal in two results; a setting that an older result lacks counts as different
SAME = ("backbone", "dtype", "calibration", "seed", "window", "score_from", "protocol", "prefill")


@dataclass
class Gain:
    """One policy at one footprint, on one kind of text, before and after a training.

    Attributes:
        run: folder of the trained model's result.
        text: kind of text.
        contender: name of the policy.
        target: footprint that was asked for.
        footprint: measured after training. A price is solved on each model's own keys.
        footprint_before: measured before training.
        nll: NLL under eviction after training, nats a token. A cost also falls where a model reads worse with all keys.
        nll_before: the same before training.
        nll_change: nll − nll_before.
        nll_interval: of `nll_change`, 95 %, bootstrap over documents.
        cost: NLL under eviction − NLL with a full cache, of the trained model, nats a token.
        cost_before: the same of the model before training.
        change: cost − cost_before.
        change_interval: of `change`, 95 %, bootstrap over documents.
        fall: 1 − cost ÷ cost_before; None: `cost_before` is not above 0 (95 %).
        interval: of `fall`, 95 %, bootstrap over documents.
    """

    run: str
    text: str
    contender: str
    target: float
    footprint: float
    footprint_before: float
    nll: float
    nll_before: float
    nll_change: float
    nll_interval: tuple[float, float]
    cost: float
    cost_before: float
    change: float
    change_interval: tuple[float, float]
    fall: float | None
    interval: tuple[float, float] | None


def gains(out: str, base: str, trained: list[str], against: str | None = None) -> None:
    """Measure how a training changed the cost of eviction, and the model's NLL with a full cache.

    Args:
        out: folder for gains.json, gains.md and the picture.
        base: folder with the `compare.json` of the model before training.
        trained: folders with the `compare.json` of trained models, measured on the same windows.
        against: one of `trained`, such as plain LoRA on the same tokens. Costs are then compared with its cost in place
            of the base's. Null: with the base's.
    """
    console = make_console()
    if against is not None and against not in trained:
        raise SmartKVError(f"against must be one of the folders in trained, got '{against}'")
    before = read_result(Path(base) / "compare.json")
    all_gains, changes = [], []
    for folder in trained:
        after = read_result(Path(folder) / "compare.json")
        _check_same(before, after, base, folder)
        changes += [_full(folder, text, before, after) for text in before["full"]["texts"]]
    reference = read_result(Path(against) / "compare.json") if against else before
    for folder in trained:
        if folder != against:
            all_gains += _gains(folder, reference, read_result(Path(folder) / "compare.json"))
    tables = [_full_table(changes), _table(all_gains, against or base)]
    arguments = {"base": base, "trained": trained, "against": against}
    result = write_result(Path(out), "gains", arguments, {"units": UNITS, "full": changes, "gains": _plain(all_gains)})
    for table in tables:
        console.print(table)
    bars = [GainBar(g.run, g.text, g.contender, g.target, g.cost_before, g.fall, g.interval) for g in all_gains]
    picture = save_picture(gains_picture(bars), Path(out) / "gains.png")
    for path in (result, write_tables(Path(out) / "gains.md", tables), picture):
        console.print(f"  {path}", highlight=False)


UNITS = {
    "cost, cost_before": "NLL under eviction − NLL with a full cache, of the same model, nats a token",
    "change": "cost − cost_before; change_interval: 95 %, bootstrap over documents",
    "fall": "1 − cost ÷ cost_before; interval: 95 %, bootstrap over documents; null where cost_before is not above 0",
    "nll, nll_before": "nats a token; of full: with a full cache, of gains: under eviction",
    "nll_change": "nll − nll_before; nll_interval: 95 %, bootstrap over documents",
}


def _check_same(before: dict[str, Any], after: dict[str, Any], base: str, folder: str) -> None:
    """Refuse results that were not measured with the same settings on the same windows."""
    for where, result in ((base, before), (folder, after)):
        if "texts" not in result.get("full", {}):
            raise SmartKVError(f"{where} has no compare.json with the full cache's NLL: run eval compare there again")
    there, here = before["arguments"], after["arguments"]
    unlike = [name for name in SAME if name not in there or name not in here or there[name] != here[name]]
    unlike += [text for text in there["texts"] if here["texts"].get(text) != there["texts"][text]]
    if unlike:
        raise SmartKVError(
            f"{folder} and {base} were not measured alike ({', '.join(unlike)}): give both the same config"
        )


def _over(windows: list[float]) -> Tensor:
    return torch.tensor(windows, dtype=torch.float64)


def _full(folder: str, text: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    nll, nll_before = (_over(each["full"]["texts"][text]["nll_window"]) for each in (after, before))
    owners, gap = before["arguments"]["texts"][text]["documents"], nll - nll_before
    interval = bootstrap(len(gap), lambda weight: (weight @ gap) / weight.sum(dim=1), groups=owners)
    figures = {"nll": float(nll.mean()), "nll_before": float(nll_before.mean()), "change": float(gap.mean())}
    return {"run": folder, "text": text} | figures | {"interval": list(interval)}


def _gains(folder: str, before: dict[str, Any], after: dict[str, Any]) -> list[Gain]:
    """Compare every policy and footprint that both results have."""
    rows_before = {(row["contender"], row["target"]): row["texts"] for row in before["rows"]}
    gains_of_run = []
    for row in after["rows"]:
        for text, figures in row["texts"].items():
            other = rows_before.get((row["contender"], row["target"]), {}).get(text)
            if other is None:
                continue
            cost, cost_before = (_over(each["delta_nll_window"]) for each in (figures, other))
            nll_full, nll_full_before = (_over(each["full"]["texts"][text]["nll_window"]) for each in (after, before))
            read, read_before = nll_full + cost, nll_full_before + cost_before  # under eviction
            owners = before["arguments"]["texts"][text]["documents"]

            def fall(weight: Tensor, cost: Tensor = cost, cost_before: Tensor = cost_before) -> Tensor:
                return 1 - (weight @ cost) / (weight @ cost_before)

            def mean(weight: Tensor, figures: Tensor) -> Tensor:
                return (weight @ figures) / weight.sum(dim=1)

            above_0 = bootstrap(len(cost), partial(mean, figures=cost_before), groups=owners)[0] > 0
            known = float(fall(torch.ones(1, len(cost), dtype=torch.float64)))
            gains_of_run.append(
                Gain(
                    run=folder,
                    text=text,
                    contender=row["contender"],
                    target=row["target"],
                    footprint=figures["footprint"],
                    footprint_before=other["footprint"],
                    nll=float(read.mean()),
                    nll_before=float(read_before.mean()),
                    nll_change=float((read - read_before).mean()),
                    nll_interval=bootstrap(len(cost), partial(mean, figures=read - read_before), groups=owners),
                    cost=float(cost.mean()),
                    cost_before=float(cost_before.mean()),
                    change=float((cost - cost_before).mean()),
                    change_interval=bootstrap(len(cost), partial(mean, figures=cost - cost_before), groups=owners),
                    fall=known if above_0 else None,
                    interval=bootstrap(len(cost), fall, groups=owners) if above_0 else None,
                )
            )
    if not gains_of_run:
        raise SmartKVError(f"{folder} has no policy and footprint in common with the result that it is compared with")
    return gains_of_run


def _plain(gains: list[Gain]) -> list[dict[str, Any]]:
    return [asdict(gain) for gain in gains]


def _full_table(changes: list[dict[str, Any]]) -> Table:
    table = Table(title="with a full cache, nats a token")
    for name in ("run", "text", "before", "after", "change (95 %)"):
        table.add_column(name, justify="left" if name in ("run", "text") else "right")
    for each in changes:
        nlls = f"{each['nll_before']:.4f}", f"{each['nll']:.4f}"
        table.add_row(each["run"], each["text"], *nlls, _signed(each["change"], each["interval"]))
    return table


def _signed(change: float, interval: Sequence[float]) -> str:
    return f"{change:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"


def _table(gains: list[Gain], reference: str) -> Table:
    table = Table(title=f"what eviction costs, nats a token; before: {reference}")
    for name in (
        "run",
        "text",
        "policy",
        "footprint",
        "NLL before, after",
        "its change (95 %)",
        "cost before",
        "cost",
        "its change (95 %)",
        "fall (95 %)",
    ):
        table.add_column(name, justify="left" if name in ("run", "text", "policy") else "right")
    for number, gain in enumerate(gains):
        if number and gains[number - 1].run != gain.run:
            table.add_section()
        footprints = f"{gain.footprint_before:.3f}, {gain.footprint:.3f}"
        change, fall = _signed(gain.change, gain.change_interval), "–"
        if gain.fall is not None and gain.interval is not None:
            fall = f"{gain.fall:.0%} ({gain.interval[0]:.0%} to {gain.interval[1]:.0%})"
        read = f"{gain.nll_before:.4f}, {gain.nll:.4f}", _signed(gain.nll_change, gain.nll_interval)
        costs = f"{gain.cost_before:.4f}", f"{gain.cost:.4f}"
        table.add_row(gain.run, gain.text, f"{gain.contender} {gain.target:g}", footprints, *read, *costs, change, fall)
    return table
