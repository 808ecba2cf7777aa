"""What `eval compare` reports of recall: shares of right answers, by kind of text."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from rich.table import Table

from smartkv.errors import SmartKVError
from smartkv.metrics.bootstrap import bootstrap, mean_over


class Recalling(Protocol):
    """A row of `eval compare`, see `eval.eviction.compare_report.Row`."""

    contender: str
    target: float
    recall: list[dict[str, Any]]


def recall_share(row: Recalling, full: Recalling) -> dict[str, Any]:
    """Return the share of right answers among the trials that the full cache gets right.

    Returns:
        `asked` (number of trials), `right` (share), `interval` (95 %, bootstrap over trials), `footprint`, `nll`, and
        `kinds`: the same for each kind of text.

    Raises:
        SmartKVError: the row was asked other trials.
    """
    if len(row.recall) != sum(trial["right"] for trial in full.recall):
        raise SmartKVError(f"{row.contender} was asked other facts than those that the full cache recalls")
    return _share(row.recall) | {"kinds": {kind: _share(trials) for kind, trials in _by_kind(row).items()}}


def recalled_by_full(full: Recalling) -> dict[str, Any] | None:
    """Return the share of all trials that the full cache gets right, in the form of `recall_share`; None: no trials."""
    if not full.recall:
        return None
    return _share(full.recall) | {"kinds": {kind: _share(trials) for kind, trials in _by_kind(full).items()}}


def recall_table(rows: Sequence[Recalling], full: Recalling, shares: dict[int, dict[str, Any]]) -> Table | None:
    """Make a table with a column for each kind of text.

    Args:
        rows: all rows but the full cache's.
        full: the full cache's row.
        shares: `recall_share` by the id of its row.

    Returns:
        None if there are facts in books alone: the tables of texts have a column for those.
    """
    kinds = list(_by_kind(full))
    if kinds in ([], ["books"]):
        return None
    alone = recalled_by_full(full) or {}
    told = ", ".join(
        f"{kind} {share['right'] * share['asked']:.0f} of {share['asked']}" for kind, share in alone["kinds"].items()
    )
    table = Table(title=f"facts recalled, of those that the full cache recalls ({told})")
    for name in ("", "footprint", *kinds, "all"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for number, row in enumerate(rows):
        if number and row.contender != rows[number - 1].contender:
            table.add_section()
        share = shares[id(row)]
        of_kinds = [share["kinds"].get(kind, {}) for kind in kinds]
        footprint = f"{share['footprint']:.3f}" if share["asked"] else ""
        table.add_row(row.contender, footprint, *map(_in_words, [*of_kinds, share]))
    return table


def _in_words(share: dict[str, Any]) -> str:
    if not share.get("asked"):
        return ""
    return f"{share['right']:.0%} ({share['interval'][0]:.0%} to {share['interval'][1]:.0%})"


def _by_kind(row: Recalling) -> dict[str, list[dict[str, Any]]]:
    """Return the trials of each kind of text."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for trial in row.recall:
        kinds.setdefault(trial.get("kind", "books"), []).append(trial)
    return kinds


def _share(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of trials that are right, its interval, and the mean footprint and NLL."""
    if not trials:
        return {"asked": 0, "right": None, "interval": None, "footprint": None}
    right = torch.tensor([float(trial["right"]) for trial in trials], dtype=torch.float64)
    interval = bootstrap(len(right), lambda weight: mean_over(weight, right))
    footprint = sum(trial["footprint"] for trial in trials) / len(trials)
    nll = sum(trial["nll"] for trial in trials) / len(trials)
    share = {"asked": len(trials), "right": float(right.mean()), "interval": list(interval)}
    return share | {"footprint": footprint, "nll": nll}
