"""`python -m eval kinds`: measures what gates lose on each kind of text when they keep equally much of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from eval.common.console import make_console, say_once
from eval.common.options import AdaptedModel, Measure, NamedTexts, check_names
from eval.common.results import machine, provenance, save_picture, write_result, write_tables
from eval.common.resume import Measurements, digest, digest_of_model, digests
from eval.eviction.kinds_figure import KindBar, kinds_picture, short_names
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import check_window
from smartkv.metrics.bootstrap import bootstrap, mean_over
from smartkv.metrics.perplexity import evicted_nll, query_before, window_nll
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.named import read_policy
from smartkv.texts.windows import plan_windows

WINDOW = "window"
DOCUMENTS = 3  # a bootstrap over fewer says nothing


@dataclass
class KindRow:
    """One contender on one kind of text at one footprint.

    Attributes:
        contender: folder, hub id or name of the gates; `window`: the sliding window.
        kind: name of the kind of text.
        target: footprint for which the price (the window's length) was solved on the measured windows themselves.
        footprint: share of a full cache's keys that the cache really held, mean over the windows.
        remembered: share that the price which the gates remember for `target` would keep; None: they remember none.
        delta_nll: mean NLL − the full cache's, nats a token.
        interval: of `delta_nll`, 95 %, bootstrap over documents; None: they are fewer than `DOCUMENTS`.
        times_first: `delta_nll` ÷ that of the first kind of text at the same footprint; None: that one is not above 0
            (95 %).
        nll_full: mean NLL of the full cache, nats a token.
        windows: number of windows.
        documents: number of documents that they are from.
    """

    contender: str
    kind: str
    target: float
    footprint: float
    remembered: float | None
    delta_nll: float
    interval: tuple[float, float] | None
    times_first: float | None
    nll_full: float
    windows: int
    documents: int


def kinds(
    out: str,
    gates: list[str],
    texts: list[NamedTexts] = [NamedTexts(name="books", windows=12)],  # noqa: B006, B008
    footprints: list[float] = [0.25, 0.125],  # noqa: B006
    measure: Measure = Measure(),  # noqa: B008
    model: AdaptedModel = AdaptedModel(),  # noqa: B008
) -> None:
    """Measure gates by kind of text at equal footprint. A run that was killed goes on where it stopped.

    One price keeps another share of every kind of text, so figures at one price mix what gates lose with what they
    keep. Here the price is solved on the measured windows, for each kind of text by itself; no label and no loss is
    looked at for it. The table also says what the price that the gates remember would keep.

    Args:
        out: folder for kinds.json, kinds.md and the picture.
        gates: folders of exported gates, hub ids, or names of gates that come with SmartKV. The sliding window is
            always measured beside them.
        texts: kinds of text; others are compared with the first.
        footprints: shares of the full cache to keep.
        measure: which tokens are read, and which of them are scored.
        model: the frozen language model, with an adapter if one is given.
    """
    console = make_console()
    if not 1 <= measure.score_from < measure.window:
        raise SmartKVError(
            f"score_from must be at least 1 and below the window of {measure.window} tokens, got {measure.score_from}"
        )
    if not footprints or not all(0 < f <= 1 for f in footprints):
        raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {footprints}")
    if not texts:
        raise SmartKVError("there must be texts: give at least one kind")
    check_names(texts)
    banks = {name: GateBank.from_pretrained(name) for name in gates}
    for name, bank in banks.items():
        if "policy" not in bank.details:
            raise SmartKVError(f"the gates {name} remember no policy whose price could be solved: distil or fit them")
    lm = model.load()
    check_window(lm.model, measure.window)
    for name, bank in banks.items():
        lm.fingerprint.check(bank.fingerprint, f"the gates in {name}")
        banks[name] = bank.to(model.device)
    say, plans = say_once(console), {}
    for text in texts:
        counts: dict[str, int] = {text.split: text.windows}
        plan = plan_windows(
            text.sources, counts, lm.tokenizer, measure.window, measure.windows_per_document, measure.seed, say
        )
        plans[text.name] = plan.of_split(text.split), plan.documents_of_split(text.split), plan.sources
    settings = {
        "backbone": model.backbone,
        "model": digest_of_model(lm.model),
        "adapter": model.adapter,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "window": measure.window,
        "score_from": measure.score_from,
        "seed": measure.seed,
    }
    with Progress(console=console) as progress:
        cells = Measurements(Path(out) / "kinds.cells", settings)
        runner = _Runner(lm, banks, measure.score_from, cells, progress, len(texts) * (1 + len(banks)))
        rows = [row for name, plan in plans.items() for row in runner.rows(name, plan[0], plan[1], footprints)]
    if not rows:
        raise SmartKVError("no footprint can be kept on these texts: give larger ones, or longer windows")
    first = {(row.contender, row.target): row for row in rows if row.kind == texts[0].name}
    for row in rows:
        beside = first.get((row.contender, row.target))
        if beside is not None and beside.interval is not None and beside.interval[0] > 0:
            row.times_first = row.delta_nll / beside.delta_nll
    sources = {
        name: {"windows": len(plan[0]), "sources": plan[2], "digest": digest(plan[0])} for name, plan in plans.items()
    }
    _report(console, Path(out), settings | {"gates": gates, "texts": sources, "machine": machine(model.device)}, rows)


class _Runner:
    """Reads the windows of each kind of text under each contender; figures of earlier runs are not measured again."""

    def __init__(
        self,
        lm: Backbone,
        banks: dict[str, GateBank],
        first_token: int,
        cells: Measurements,
        progress: Progress,
        parts: int,
    ) -> None:
        self.lm, self.banks, self.first_token, self.cells, self.progress = lm, banks, first_token, cells, progress
        self.task = progress.add_task("Kinds of text", total=parts)

    def rows(self, kind: str, windows: Tensor, owners: Sequence[int], footprints: Sequence[float]) -> list[KindRow]:
        """Measure all contenders on one kind of text.

        Args:
            kind: its name.
            windows: ids `[windows, tokens]`.
            owners: number of the document of each window.
            footprints: to be kept.
        """
        self.progress.update(self.task, description=f"{kind}: full cache")
        full = torch.tensor([self._full(tokens) for tokens in windows], dtype=torch.float64)
        rows = []
        for name, bank in [*self.banks.items(), (WINDOW, None)]:
            self.progress.update(self.task, description=f"{kind}: {Path(name).name}")
            policy = HybridPolicy.from_dict(bank.details["policy"]) if bank else read_policy(WINDOW, self._layers)
            calibration = Calibration.measure(self.lm.model, bank, windows, query_before(self.first_token))
            for target in footprints:
                try:
                    solved = solve(policy, target, calibration)
                except FootprintOutOfReach as error:  # the other footprints are still measured
                    self.progress.console.print(f"left out, {kind}: {error}", highlight=False)
                    continue
                read = [self._evicted(bank, solved, tokens) for tokens in windows]
                loss = torch.tensor([figures["nll"] for figures in read], dtype=torch.float64) - full
                kept = sum(figures["footprint"] for figures in read) / len(read)
                documents, interval = len(set(owners)), None
                if documents >= DOCUMENTS:
                    interval = bootstrap(len(loss), lambda weight, loss=loss: mean_over(weight, loss), groups=owners)  # type: ignore[misc]
                remembered = self._remembered(bank, target, calibration)
                figures = float(loss.mean()), interval, None, float(full.mean()), len(windows), documents
                row = KindRow(name, kind, target, kept, remembered, *figures)
                rows.append(row)
            self.progress.advance(self.task)
        return rows

    @property
    def _layers(self) -> int:
        return self.lm.architecture.layers

    def _full(self, tokens: Tensor) -> float:
        return self.cells.measured(
            ["full", digest(tokens)], lambda: window_nll(self.lm.model, tokens, self.first_token)
        )

    def _evicted(self, bank: GateBank | None, policy: HybridPolicy, tokens: Tensor) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            read = evicted_nll(self.lm.model, bank, policy, tokens, self.first_token)
            return {"nll": read.nll, "footprint": read.overall}

        return self.cells.measured([policy.to_dict(), digests(bank), digest(tokens)], measure)

    def _remembered(self, bank: GateBank | None, target: float, calibration: Calibration) -> float | None:
        """Return what the remembered price of a footprint keeps of the measured windows."""
        if bank is None:
            return None
        try:
            return calibration.footprint(policy_of(bank, target))
        except FootprintOutOfReach:
            return None


UNITS = {
    "delta_nll": "nats a token; interval: 95 %, bootstrap over documents; null for fewer than 3",
    "footprint": "keys seen ÷ keys of a full cache, over the queries whose next token is scored",
    "remembered": "the same at the price that the gates remember for the target",
    "times_first": "delta_nll ÷ that of the first kind of text; null where that is not above 0 (95 %)",
}


def _report(console: Any, out: Path, settings: dict[str, Any], rows: list[KindRow]) -> None:
    names = short_names(list(dict.fromkeys(row.contender for row in rows)))
    table = Table(title=f"{settings['backbone']}, windows of {settings['window']:,} tokens")
    for name in ("contender", "kind", "asked", "kept", "at its own price", "ΔNLL (95 %)", "× first", "full NLL"):
        table.add_column(name, justify="left" if name in ("contender", "kind") else "right")
    for number, row in enumerate(rows):
        if number and rows[number - 1].kind != row.kind:
            table.add_section()
        remembered = "–" if row.remembered is None else f"{row.remembered:.3f}"
        loss = f"{row.delta_nll:+.4f} ({row.documents} documents)"
        if row.interval is not None:
            loss = f"{row.delta_nll:+.4f} ({row.interval[0]:+.4f} to {row.interval[1]:+.4f})"
        times = "–" if row.times_first is None else f"{row.times_first:.2f}"
        figures = f"{row.target:g}", f"{row.footprint:.3f}", remembered, loss, times
        table.add_row(names[row.contender], row.kind, *figures, f"{row.nll_full:.3f}")
    result = write_result(out, "kinds", settings, {"units": UNITS, "rows": [asdict(row) for row in rows]})
    bars = [KindBar(row.contender, row.kind, row.target, row.delta_nll, row.interval) for row in rows]
    picture = save_picture(kinds_picture(bars), out / "kinds.png")
    console.print(table)
    for path in (result, write_tables(out / "kinds.md", [table], provenance("kinds", settings)), picture):
        console.print(f"  {path}", highlight=False)
