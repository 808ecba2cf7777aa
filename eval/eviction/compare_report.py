"""The report of `eval compare`: rows, intervals, tables and pictures from its readings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from eval.common.footprint_figures import DELTA_NLL, contenders_figure
from eval.common.results import machine, save_picture, write_result, write_tables
from eval.eviction.frontier import REFERENCE, equal_loss_ratio, loss_at
from eval.eviction.recall_report import recall_share, recall_table, recalled_by_full
from smartkv.metrics.bootstrap import bootstrap, mean_over

ORACLE = "oracle:"
BYTES = "bytes held: share of the full cache's in float16 (simulated rules: of its keys)"
KINDS = ("ours", "quantised", "rule", "null", "oracle", "full")


@dataclass
class Row:
    """One contender at one footprint.

    Attributes:
        contender: name of the contender.
        kind: see `eval.contenders.base.Contender`.
        needs: see `eval.contenders.base.Contender`.
        target: footprint that was asked for.
        setting: setting that was solved for it.
        texts: by kind of text, the figures of each window: nll, footprint, peak_bytes, stored, held.
        recall: the same figures of each trial, `right`, and the `kind` of its text. The full cache is asked all trials,
            others only those that the full cache gets right.
    """

    contender: str
    kind: str
    needs: str
    target: float
    setting: Any
    texts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    recall: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Curve:
    """One row on one kind of text, compared with the full cache.

    Attributes:
        row: the contender at its footprint.
        footprint: mean over windows.
        delta_nll: NLL minus the full cache's, nats a token, mean over windows.
        interval: of `delta_nll`, 95 %, bootstrap over documents.
        delta_nll_window: `delta_nll` of each window.
        peak_bytes: largest of the windows; None: simulated by a mask, nothing was freed.
        stored: bytes held at the end ÷ bytes of a full cache in float16, mean over windows; None: simulated by a mask.
        held: keys held at the end ÷ keys of a full cache, mean over windows; None: simulated by a mask.
    """

    row: Row
    footprint: float
    delta_nll: float
    interval: tuple[float, float]
    delta_nll_window: list[float]
    peak_bytes: int | None
    stored: float | None = None
    held: float | None = None


def curve(row: Row, text: str, full: Row, owners: list[int]) -> Curve:
    """Compare a row with the full cache on one kind of text.

    Args:
        row: any row.
        text: name of the kind of text.
        full: the full cache's row.
        owners: number of the document of each window.
    """
    nll, base = (torch.tensor([w["nll"] for w in r.texts[text]], dtype=torch.float64) for r in (row, full))
    delta = nll - base
    interval = bootstrap(len(delta), lambda weight: mean_over(weight, delta), groups=owners)
    windows = row.texts[text]
    peaks = [w["peak_bytes"] for w in windows if w["peak_bytes"] is not None]
    footprint = sum(w["footprint"] for w in windows) / len(windows)
    peak, (stored, held) = max(peaks, default=None), (_mean_of(windows, name) for name in ("stored", "held"))
    return Curve(row, footprint, float(delta.mean()), interval, delta.tolist(), peak, stored, held)


def _mean_of(windows: list[dict[str, Any]], name: str) -> float | None:
    """Return the mean of a figure over the windows that have it; None: none has."""
    figures = [window[name] for window in windows if window.get(name) is not None]
    return sum(figures) / len(figures) if figures else None


def seeds_together(rows: list[Row]) -> list[Row]:
    """Merge the rows of one contender under several seeds (`random:0`, `random:1` …): the mean of each window."""
    together: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        name, _, seed = row.contender.rpartition(":")
        together.setdefault((name if name and seed.isdigit() else row.contender, row.target), []).append(row)
    merged = []
    for (name, target), same in together.items():
        first = same[0]
        texts = {text: [_mean(w) for w in zip(*(r.texts[text] for r in same), strict=True)] for text in first.texts}
        recall = [_mean(trial) for trial in zip(*(r.recall for r in same), strict=True)]
        merged.append(Row(name, first.kind, first.needs, target, first.setting, texts, recall))
    return merged


def _mean(figures: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    if len(figures) == 1:
        return figures[0]
    names = [name for name, value in figures[0].items() if value is not None and name != "kind"]
    means = {name: sum(float(f[name]) for f in figures) / len(figures) for name in names}
    return {"peak_bytes": None} | means | ({"kind": figures[0]["kind"]} if "kind" in figures[0] else {})


def report(
    console: Console, out: Path, settings: dict[str, Any], rows: list[Row], owners: dict[str, list[int]]
) -> None:
    """Write `compare.json`, `compare.md` (a table for each kind of text) and the pictures, and print the tables.

    Args:
        console: prints the tables.
        out: folder.
        settings: arguments of the run.
        rows: all rows, the full cache's among them.
        owners: by kind of text, number of the document of each window.
    """
    rows = seeds_together(rows)
    full = next(row for row in rows if row.kind == "full")
    rest = sorted((row for row in rows if row is not full), key=lambda row: KINDS.index(row.kind))
    shares = {id(row): recall_share(row, full) for row in rest} if full.recall else {}
    alone = {text: [w["nll"] for w in windows] for text, windows in full.texts.items()}
    whole = {text: {"nll": sum(nll) / len(nll), "nll_window": nll} for text, nll in alone.items()}
    figures: dict[str, Any] = {
        "units": UNITS,
        "machine": machine(settings["device"]),
        "full": _plain(full) | {"texts": whole, "recall": recalled_by_full(full)},
        "rows": [],
    }
    pictures, tables = [], []
    curves: dict[str, list[Curve]] = {}
    for text in full.texts:
        curves[text] = [curve(row, text, full, owners[text]) for row in rest]
        series = _series((c.row, c.footprint, c.delta_nll, *c.interval) for c in curves[text])
        title = f"{settings['backbone']}, {len(owners[text])} windows of {settings['window']:,} tokens: {text}"
        pictures.append(save_picture(contenders_figure(series, title, DELTA_NLL), out / f"frontier_{text}.png"))
        if any(c.row.kind == "quantised" for c in curves[text]):
            series = _series((c.row, c.stored or c.footprint, c.delta_nll, *c.interval) for c in curves[text])
            pictures.append(
                save_picture(contenders_figure(series, title, DELTA_NLL, axis=BYTES), out / f"bytes_{text}.png")
            )
        title = f"{text}; full cache: {whole[text]['nll']:.4f} nats a token"
        tables.append(_table(title, curves[text], shares, owners[text]))
    if of_kinds := recall_table(rest, full, shares):
        tables.append(of_kinds)
    asked = max((share["asked"] for share in shares.values()), default=0)
    if asked:
        points = ((r, s["footprint"], s["right"], *s["interval"]) for r in rest if (s := shares[id(r)]))
        title = f"{settings['backbone']}: {asked} facts of {len(full.recall)} that the full cache recalls"
        picture = contenders_figure(_series(points), title, "share recalled", loss=False)
        pictures.append(save_picture(picture, out / "recall.png"))
    for number, row in enumerate(rest):
        entry = _plain(row) | {"recall": shares.get(id(row))}
        entry["texts"] = {text: _figures(of_text[number], of_text, owners[text]) for text, of_text in curves.items()}
        figures["rows"].append(entry)
    result = write_result(out, "compare", settings, figures)
    for table in tables:
        console.print(table)
    for path in [result, write_tables(out / "compare.md", tables), *pictures]:
        console.print(f"  {path}", highlight=False)


UNITS = {
    "nll": "nats a token of the full cache",
    "footprint": "keys seen ÷ keys of a full cache, over the queries whose next token is scored",
    "held": "keys held when the text was read ÷ keys of a full cache; null: simulated by a mask",
    "delta_nll": "nats a token above the full cache",
    "interval": "95 %, bootstrap over documents (recall: over trials)",
    "ratio": "footprint ÷ the window's at equal ΔNLL",
    "gap_recovered": "(window's ΔNLL − own) ÷ (window's − the oracle's) at the own footprint",
    "recall": "share of the answers right, among those that the full cache gets right; of the full cache: of all",
    "stored": "bytes held when the text was read ÷ those of its keys and values in float16; null: simulated by a mask",
    "peak_bytes": "of one sequence's cache, the chunk at work included; null: simulated by a mask",
}


def _plain(row: Row) -> dict[str, Any]:
    names = ("contender", "kind", "needs", "target", "setting")
    return {name: getattr(row, name) for name in names} | {"recall_trials": row.recall}


def _of(curves: list[Curve], contender: str) -> list[Curve]:
    return [c for c in curves if c.row.contender == contender]


def _figures(own: Curve, curves: list[Curve], owners: list[int]) -> dict[str, Any]:
    reference = _of(curves, REFERENCE)
    figures: dict[str, Any] = {
        "footprint": own.footprint,
        "delta_nll": own.delta_nll,
        "interval": list(own.interval),
        "peak_bytes": own.peak_bytes,
        "stored": own.stored,
        "held": own.held,
        "delta_nll_window": own.delta_nll_window,
    }
    if own.row.contender != REFERENCE and (ratio := equal_loss_ratio(own, reference, owners)):
        figures["ratio"], figures["ratio_interval"] = ratio[0], list(ratio[1])
    if own.row.contender != REFERENCE and own.row.kind != "oracle":
        figures["gap_recovered"] = {
            name.removeprefix(ORACLE): gap
            for name in dict.fromkeys(c.row.contender for c in curves if c.row.kind == "oracle")
            if (gap := _gap(own, reference, _of(curves, name))) is not None
        }
    return figures


def _gap(own: Curve, reference: list[Curve], oracle: list[Curve]) -> float | None:
    """Return the share of the window-to-oracle gap recovered at the own footprint; None: a curve does not reach it."""
    window, best = loss_at(own.footprint, reference), loss_at(own.footprint, oracle)
    if window is None or best is None or window <= best:
        return None
    return (window - own.delta_nll) / (window - best)


def _series(points: Any) -> dict[str, tuple[str, list[tuple[float, float, float, float]]]]:
    """Collect points by the name of the contender: name -> (kind, points)."""
    series: dict[str, tuple[str, list[tuple[float, float, float, float]]]] = {}
    for row, *figures in points:
        series.setdefault(row.contender, (row.kind, []))[1].append(tuple(figures))
    return series


def _table(title: str, curves: list[Curve], shares: dict[int, dict[str, Any]], owners: list[int]) -> Table:
    names = (
        "",
        "needs",
        "footprint",
        "held",
        "ΔNLL (95 %)",
        "÷ window's (95 %)",
        "gap recovered",
        "recall (95 %)",
        "stored",
        "peak",
    )
    rows = []
    for own in curves:
        figures, share = _figures(own, curves, owners), shares.get(id(own.row), {})
        gaps = figures.get("gap_recovered", {})
        cells = (
            own.row.contender,
            own.row.needs,
            f"{own.footprint:.3f}",
            "" if own.held is None else f"{own.held:.3f}",
            f"{own.delta_nll:+.4f} ({own.interval[0]:+.4f} to {own.interval[1]:+.4f})",
            f"{figures['ratio']:.2f} ({figures['ratio_interval'][0]:.2f} to {figures['ratio_interval'][1]:.2f})"
            if "ratio" in figures
            else "",
            ", ".join(f"{name} {gap:.0%}" for name, gap in gaps.items()),
            f"{share['right']:.0%} ({share['interval'][0]:.0%} to {share['interval'][1]:.0%})"
            if share.get("asked")
            else "",
            "mask" if own.stored is None else f"{own.stored:.3f}",
            "mask" if own.peak_bytes is None else f"{own.peak_bytes / 2**20:.1f} MiB",
        )
        rows.append(cells)
    told = [place for place, cells in enumerate(zip(*rows, strict=True)) if any(cells)]  # columns with anything in them
    table = Table(title=title)
    for place in told:
        table.add_column(names[place], justify="left" if place < 2 else "right", no_wrap=True)
    for number, cells in enumerate(rows):
        if number and curves[number].row.contender != curves[number - 1].row.contender:
            table.add_section()
        table.add_row(*(cells[place] for place in told))
    return table
