"""Figures of contenders beside those of the full cache on the same samples, with intervals."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.tasks.report import Row, counted, full_of, mean, shown
from smartkv.metrics.bootstrap import bootstrap, mean_over

LOSSES = ("nll",)  # less is better, and a ratio says nothing


def beside_full(row: Row, full: Row, key: str) -> dict[str, Any] | None:
    """Compare a contender with the full cache on the samples that both have.

    Args:
        row: of the contender.
        full: of the full cache, with the same samples in the same order.
        key: figure of a sample.

    Returns:
        Figures, fit for JSON. `samples`: their number. `mean`, `full`: means of the contender and of the full cache.
        `difference`: the first minus the second. `ratio`: the first ÷ the second; None where the full cache has 0, and
        for losses. `difference_95`, `ratio_95`: intervals by bootstrap over samples (over clusters where samples have
        some). `kept_where_full_is`, `of`: share of the samples right, among those that the full cache gets right, and
        their number. None: no sample has the figure.
    """
    own_by_group: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for sample in row.samples:
        own_by_group.setdefault(tuple(sample["group"]), []).append(sample)
    pairs = []
    for group in dict.fromkeys(tuple(sample["group"]) for sample in full.samples):
        own_samples, full_samples = own_by_group.get(group, []), full.of(*group)
        if len(own_samples) == len(full_samples):  # else a footprint was out of reach at some length
            pairs += list(zip(own_samples, full_samples, strict=True))
    pairs = [(own, whole) for own, whole in pairs if own[key] is not None and whole[key] is not None]
    if not pairs:
        return None
    values = torch.tensor([[float(own[key]), float(whole[key])] for own, whole in pairs], dtype=torch.float64)
    names = [own.get("cluster") or str(number) for number, (own, _) in enumerate(pairs)]
    groups = [sorted(set(names)).index(name) for name in names]

    def difference(weight: Tensor) -> Tensor:
        return mean_over(weight, values[:, 0]) - mean_over(weight, values[:, 1])

    def ratio(weight: Tensor) -> Tensor:
        whole = mean_over(weight, values[:, 1])
        return mean_over(weight, values[:, 0]) / whole.where(whole > 0, torch.nan)

    own_mean, full_mean = values.mean(dim=0).tolist()
    figures: dict[str, Any] = {"samples": len(pairs), "mean": own_mean, "full": full_mean}
    figures |= {"difference": own_mean - full_mean, "ratio": None, "ratio_95": None}
    figures["difference_95"] = list(bootstrap(len(pairs), difference, groups=groups))
    if key not in LOSSES:
        if full_mean:
            figures |= {"ratio": own_mean / full_mean, "ratio_95": list(bootstrap(len(pairs), ratio, groups=groups))}
        right = [float(own[key] > 0.5) for own, whole in pairs if whole[key] > 0.5]
        figures |= {"kept_where_full_is": mean(right), "of": len(right)}
    return figures


def all_beside_full(rows: Sequence[Row], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Compare every contender at every footprint and length with the full cache.

    Args:
        rows: of all contenders, merged by length.
        keys: figures of a sample.

    Returns:
        For each row but the full cache's: `contender`, `target`, `length`, and for each key what `beside_full` returns.
    """
    found = []
    for row in rows:
        if row.kind != "full":
            compared = {key: beside_full(row, full_of(rows, row.length), key) for key in keys}
            found.append({"contender": row.contender, "target": row.target, "length": row.length} | compared)
    return found


def paired_table(title: str, compared: Sequence[dict[str, Any]], names: dict[str, str]) -> Table:
    """Make a table of what `all_beside_full` returns, a line for each contender, footprint, length and known figure.

    Args:
        title: of the table.
        compared: the figures.
        names: key of a figure -> its name in the table.
    """
    table = Table(title=title)
    for number, name in enumerate(("", "tokens", "figure", "n", "full", "÷ full", "− full", "kept")):
        table.add_column(name, justify="right" if number not in (0, 2) else "left", no_wrap=True)
    for line in compared:
        label = f"{line['contender']} {line['target']:g}" if line["target"] < 1 else line["contender"]
        for key, name in names.items():
            if line[key] is not None:
                table.add_row(label, f"{line['length']:,}" if line["length"] else "all", name, *_cells(line[key], key))
                label = ""
        table.add_section()
    return table


def _cells(figures: dict[str, Any], key: str) -> list[str]:
    digits = 3 if key in LOSSES else 2
    ratio = kept = ""
    if figures["ratio"] is not None:
        ratio = f"{shown(figures['ratio'])} [{', '.join(shown(edge) for edge in figures['ratio_95'])}]"
    if key not in LOSSES:
        kept = counted(figures["kept_where_full_is"], figures["of"])
    low, high = figures["difference_95"]
    difference = f"{figures['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return [str(figures["samples"]), shown(figures["full"], digits), ratio, difference, kept]
