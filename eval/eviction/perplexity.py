"""`python -m eval perplexity`: measures what a model loses when keys are evicted, by policy and footprint."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

from eval.common.console import make_console
from eval.common.figures import lines_by_layer
from eval.common.footprint_figures import frontier
from eval.common.options import Measure, Model, Texts
from eval.common.results import save_picture, write_result
from eval.common.resume import Measurements, digest, digests
from eval.contenders.policies import BUDGET
from eval.contenders.registry import policy_called
from eval.eviction.frontier import REFERENCE, Point, equal_loss_ratio, frontier_table
from smartkv.cache.arguments import own_policy
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import check_window
from smartkv.metrics.perplexity import EvictedWindow, evicted_nll, full_cache_bytes, query_before, window_nll
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.planned_budget import shares_at
from smartkv.texts.windows import plan_windows

CELLS = "perplexity.cells"


def perplexity(
    out: str,
    gates: str | None = None,
    policies: list[str] = ["default", "all-gated", "window"],  # noqa: B006 - jsonargparse shows it; never changed
    footprints: list[float] = [0.08, 0.12, 0.22, 0.35, 0.5],  # noqa: B006
    texts: Texts = Texts(),  # noqa: B008
    calibration_windows: int = 4,
    chunk: int = 1024,
    measure: Measure = Measure(),  # noqa: B008
    model: Model = Model(),  # noqa: B008
) -> None:
    """Measure perplexity under eviction, beside the full cache. A run that was killed goes on where it stopped.

    Args:
        out: folder for perplexity.json and the pictures.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Null: only policies
            without gates.
        policies: named policies (default, all-gated, lifespan, window, full) or YAML files; gates: the policy that is
            stored with the gates; gates@budget: the same under a budget of the whole window, by a floating price.
        footprints: shares of the full cache for which a policy's open figure is solved. A policy that leaves nothing
            open is measured as it is.
        texts: windows that are measured. Prices are solved on train texts (on validation texts for split train).
        calibration_windows: windows on which the open figure is solved.
        chunk: number of a text's tokens that go through the model together.
        measure: which tokens are read, and which of them are scored.
        model: the frozen language model.
    """
    console = make_console()
    window, score_from, split = measure.window, measure.score_from, texts.split
    if not 1 <= score_from < window:
        raise SmartKVError(f"score_from must be at least 1 and below the window of {window} tokens, got {score_from}")
    if min(texts.windows, calibration_windows, chunk) < 1:
        raise SmartKVError("windows, calibration_windows and chunk must be at least 1")
    architecture = model.architecture()
    bank = GateBank.from_pretrained(gates) if gates else None
    chosen = [_Chosen(policy_called(name, architecture, bank), name.endswith(BUDGET)) for name in policies]
    if any(each.policy.open for each in chosen) and not (footprints and all(0 < f <= 1 for f in footprints)):
        raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {footprints}")
    lm = model.load()
    check_window(lm.model, window)
    if bank is not None:
        lm.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
        bank = bank.to(model.device)
    learn = "validation" if split == "train" else "train"
    counts = {learn: calibration_windows, split: texts.windows}
    plan = plan_windows(
        texts.sources, counts, lm.tokenizer, window, measure.windows_per_document, measure.seed, console.print
    )
    settings = {
        "backbone": model.backbone,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "gates": gates,
        "texts": plan.sources,
        "split": split,
        "window": window,
        "windows": len(plan.of_split(split)),
        "score_from": score_from,
        "calibration_windows": len(plan.of_split(learn)),
        "chunk": chunk,
        "seed": measure.seed,
    }
    targets = sorted(set(footprints))
    with Progress(console=console) as progress:
        calibrated = progress.add_task("Calibration", total=None)
        calibration = Calibration.measure(lm.model, bank, plan.of_split(learn), query_before(score_from))
        progress.remove_task(calibrated)
        if bank is not None and any(each.floats for each in chosen):
            bank.details.setdefault("layer_shares", shares_at(own_policy(bank), targets, calibration))
        solved = []
        for each in chosen:
            for target in targets if each.policy.open else [None]:
                try:
                    solved.append(each.solved(target, calibration))
                except FootprintOutOfReach as error:  # the other footprints are still measured
                    progress.console.print(f"left out: {error}", highlight=False)
        if not solved:
            raise SmartKVError("no policy can keep any of the footprints: give larger ones")
        runner = _Runner(lm, bank, plan.of_split(split), settings, Path(out), progress, len(solved) + 1)
        full, points = runner.full(), [runner.point(*each) for each in solved]
    _write(console, Path(out), settings, full, points)


class _Chosen(NamedTuple):
    """A policy, and whether its price floats."""

    policy: HybridPolicy
    floats: bool

    def solved(self, target: float | None, calibration: Calibration) -> tuple[HybridPolicy, float | None, float | None]:
        """Return the policy, what was asked for, and the budget; None: its price stands."""
        if self.floats:
            return replace(self.policy, name=self.policy.name + BUDGET), target, target
        return self.policy if target is None else solve(self.policy, target, calibration), target, None


class _Runner:
    """Reads all windows under each policy; figures of earlier runs are not measured again."""

    def __init__(
        self,
        lm: Backbone,
        gates: GateBank | None,
        windows: torch.Tensor,
        settings: dict[str, Any],
        out: Path,
        progress: Progress,
        cells: int,
    ) -> None:
        self.lm, self.gates, self.windows, self.settings = lm, gates, windows, settings
        self.progress, self.task = progress, progress.add_task("Perplexity", total=cells * len(windows))
        key = {**settings, "weights": digests(gates), "tokens": digest(windows)}
        self.cells = Measurements(out / CELLS, key)

    def _measured(self, key: dict[str, Any], number: int, measure: Any) -> Any:
        figures = self.cells.measured([key, number], lambda: measure(self.windows[number]))
        self.progress.advance(self.task)
        return figures

    def full(self) -> list[float]:
        """Measure the NLL of each window under the full cache, nats a token."""
        self.progress.update(self.task, description="full cache")
        model, first_token = self.lm.model, self.settings["score_from"]
        self.nll = [
            self._measured({"full": True}, number, lambda tokens: window_nll(model, tokens, first_token))
            for number in range(len(self.windows))
        ]
        return self.nll

    def point(self, policy: HybridPolicy, target: float | None, budget: float | None) -> Point:
        """Measure a policy over all windows; under a budget its price is open."""
        self.progress.update(self.task, description=policy.name if target is None else f"{policy.name} at {target:g}")
        gates = self.gates if policy.gated else None

        def measure(tokens: torch.Tensor) -> dict[str, Any]:
            window = evicted_nll(
                self.lm.model, gates, policy, tokens, self.settings["score_from"], self.settings["chunk"], budget
            )
            share = {"footprint": window.footprint.tolist(), "share": window.overall, "held": window.held}
            return {"nll": window.nll, **share, "peak_bytes": window.peak_bytes}

        key = policy.to_dict() | ({} if budget is None else {"budget": budget})
        cells = [self._measured(key, number, measure) for number in range(len(self.windows))]
        windows = [
            EvictedWindow(
                c["nll"], torch.tensor(c["footprint"]).double(), c["peak_bytes"], c.get("share"), c.get("held")
            )
            for c in cells
        ]
        full_bytes = full_cache_bytes(self.lm.model, self.windows.shape[1] - 1)
        return Point.of(policy, target, self.nll, windows, full_bytes)


def _write(console: Any, out: Path, settings: dict[str, Any], full: list[float], points: list[Point]) -> None:
    reference = [point for point in points if point.policy == REFERENCE]
    rows = []
    for point in points:
        ratio = None if point.policy == REFERENCE else equal_loss_ratio(point, reference)
        ratios = {"ratio_at_equal_delta_nll": ratio and ratio[0], "ratio_interval_95": ratio and list(ratio[1])}
        rows.append(point.to_dict() | ratios)
    mean = sum(full) / len(full)
    units = {
        "delta_nll": "nats a token",
        "footprint": "keys seen ÷ keys of a full cache, over the queries whose next token is scored",
        "held": "keys held when the window was read ÷ keys of a full cache",
        "peak_bytes": "bytes of one sequence's cache, the chunk at work included",
        "interval": "95 %, bootstrap over windows",
    }
    result = write_result(out, "perplexity", settings, {"units": units, "nll_full": mean, "frontier": rows})
    title = (
        f"{settings['backbone']}, {settings['windows']} windows of {settings['window']:,} tokens ({settings['split']})"
    )
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for point in points:
        series.setdefault(point.policy, []).append((point.footprint, point.delta_nll, *point.interval))
    shares = {_name(p): [sum(h) / len(h) for h in p.footprint_by_head] for p in _in_the_middle(points)}
    layers = range(len(points[0].footprint_by_head))
    pictures = [
        save_picture(frontier(series, title), out / "frontier.png"),
        save_picture(
            lines_by_layer(
                shares, layers, "Which layers hold the memory", "share of a full cache's keys", contenders=True
            ),
            out / "footprint_by_layer.png",
        ),
    ]
    console.print(frontier_table(points, title))
    console.print(f"full cache: {mean:.4f} nats a token over tokens {settings['score_from']}…", highlight=False)
    for path in [result, *pictures]:
        console.print(f"  {path}", highlight=False)


def _name(point: Point) -> str:
    return f"{point.policy} {point.footprint:.2f}"


def _in_the_middle(points: list[Point]) -> list[Point]:
    """Choose for each policy the point in the middle of its footprints."""
    chosen = {}
    for name in dict.fromkeys(point.policy for point in points):
        own = [point for point in points if point.policy == name]
        chosen[name] = own[len(own) // 2]
    return list(chosen.values())
