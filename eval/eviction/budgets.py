"""`python -m eval budgets`: what a budget keeps of texts of every kind and length, and loses beside a fixed price."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from eval.common.console import make_console, say_once
from eval.common.options import Model, NamedTexts, check_names
from eval.common.results import machine
from eval.common.resume import Measurements, digest, digest_of_model, digests
from eval.contenders.base import held_share
from eval.eviction.budgets_report import BudgetRow, LongerRow, leave
from eval.eviction.kinds import DOCUMENTS
from smartkv.cache.arguments import own_policy
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import check_window
from smartkv.metrics.bootstrap import bootstrap, mean_over
from smartkv.metrics.perplexity import query_before, window_nll
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.planned_budget import Budget
from smartkv.texts.windows import WindowPlan, plan_windows

CLOSE = 0.02  # a fixed price holds as much as the budget if it is no further from it than this share


def budgets(
    out: str,
    gates: str,
    texts: list[NamedTexts] = [NamedTexts(name="books", windows=6)],  # noqa: B006, B008
    lengths: list[int] = [1024, 2048],  # noqa: B006
    footprints: list[float] = [0.5, 0.25, 0.125, 0.0625],  # noqa: B006
    scored: float = 0.75,
    twice: int = 1,
    windows_per_document: int = 1,
    seed: int = 0,
    model: Model = Model(),  # noqa: B008
) -> None:
    """Measure what budgets keep and lose, beside a fixed price that holds as many keys at the end of the same text.

    The fixed price is solved on each measured window for what the budget held at its end: the best that a price can do
    that is chosen beforehand. A run that was killed goes on where it stopped.

    Args:
        out: folder for budgets.json, budgets.md and the pictures.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV.
        texts: kinds of text.
        lengths: planned lengths in tokens; the windows of each kind have them.
        footprints: budgets, as shares of the full cache's keys at the planned length.
        scored: share of a window, at its end, whose tokens are scored.
        twice: windows of each kind that are read to twice the planned length, to see whether the budget still holds;
            where the model has too few positions none is.
        windows_per_document: most windows from one document, unless the texts run out.
        seed: of the choice of windows.
        model: the frozen language model.
    """
    console = make_console()
    _check(texts, lengths, footprints, scored, twice)
    bank = GateBank.from_pretrained(gates)
    architecture = model.architecture()
    policy = own_policy(bank)
    policy.check(architecture, bank)
    lm = model.load()
    lm.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
    bank = bank.to(model.device)
    for length in lengths:
        check_window(lm.model, length + 1)
    say = say_once(console)

    def windows(text: NamedTexts, count: int, tokens: int) -> WindowPlan:
        counts: dict[str, int] = {text.split: count}
        return plan_windows(text.sources, counts, lm.tokenizer, tokens, windows_per_document, seed, say)

    settings = {
        "backbone": model.backbone,
        "model": digest_of_model(lm.model),
        "gates": gates,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "scored": scored,
        "seed": seed,
    }
    rows, longer = list[BudgetRow](), list[LongerRow]()
    cells = Measurements(Path(out) / "budgets.cells", settings | {"weights": digests(bank)})
    with Progress(console=console) as progress:
        runner = _Runner(lm, bank, policy, scored, cells)
        task = progress.add_task("Budgets", total=len(texts) * len(lengths))
        for length in sorted(lengths):
            for text in texts:
                progress.update(task, description=f"{text.name}, {length:,} tokens")
                plan = windows(text, text.windows, length + 1)
                owners = plan.documents_of_split(text.split)
                for footprint in footprints:
                    rows.append(runner.row(text.name, plan.of_split(text.split), owners, footprint))
                if twice and 2 * length <= architecture.max_positions:
                    most = min(2 * length + 1, architecture.max_positions)
                    long = windows(text, twice, most).of_split(text.split)
                    longer += [runner.longer(text.name, length, long, footprint) for footprint in footprints]
                progress.advance(task)
    settings |= {"texts": {text.name: text.windows for text in texts}, "lengths": lengths, "footprints": footprints}
    leave(console, Path(out), settings | {"machine": machine(model.device)}, rows, longer)


def _check(
    texts: Sequence[NamedTexts], lengths: Sequence[int], footprints: Sequence[float], scored: float, twice: int
) -> None:
    if not texts:
        raise SmartKVError("there must be texts: give at least one kind")
    check_names(texts)
    if not lengths or min(lengths) < 128:
        raise SmartKVError(f"lengths are planned lengths of at least 128 tokens, got {list(lengths)}")
    if not footprints or not all(0 < f <= 1 for f in footprints):
        raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {list(footprints)}")
    if not 0 < scored < 1:
        raise SmartKVError(f"scored is a share of a window, above 0 and below 1, got {scored}")
    if twice < 0:
        raise SmartKVError(f"twice must be 0 or more windows, got {twice}")


@dataclass
class _Runner:
    """Reads windows under budgets and fixed prices; figures of earlier runs are not measured again."""

    lm: Backbone
    gates: GateBank
    policy: HybridPolicy
    scored: float
    cells: Measurements

    def row(self, kind: str, windows: Tensor, owners: Sequence[int], footprint: float) -> BudgetRow:
        """Measure one budget on the windows `[windows, tokens]` of one kind and length."""
        first = max(1, windows.shape[1] - round(self.scored * windows.shape[1]))
        full, floating, fixed = [], [], []
        budget = Budget(footprint=footprint, plan=windows.shape[1] - 1)

        def under_budget(tokens: Tensor) -> dict[str, float]:
            return self._read(tokens, first, budget=budget)

        for tokens in windows:
            full.append(self._measured(["full"], tokens, lambda tokens: window_nll(self.lm.model, tokens, first)))
            floating.append(self._measured([asdict(budget)], tokens, under_budget))
            at_price = partial(self._at_fixed_price, first=first, held=floating[-1]["held"])
            fixed.append(self._measured(["fixed", floating[-1]["held"]], tokens, at_price))
        whole = torch.tensor(full, dtype=torch.float64)
        loss, other = (
            torch.tensor([each["nll"] for each in read], dtype=torch.float64) - whole for read in (floating, fixed)
        )

        def interval(statistic: Callable[[Tensor], Tensor]) -> tuple[float, float] | None:
            enough = len(set(owners)) >= DOCUMENTS
            return bootstrap(len(windows), statistic, groups=owners) if enough else None

        return BudgetRow(
            kind=kind,
            length=windows.shape[1] - 1,
            asked=footprint,
            held=[each["held"] for each in floating],
            held_fixed=[each["held"] for each in fixed],
            footprint=sum(each["footprint"] for each in floating) / len(floating),
            footprint_fixed=sum(each["footprint"] for each in fixed) / len(fixed),
            delta_nll=loss.tolist(),
            delta_nll_fixed=other.tolist(),
            interval=interval(lambda weight: mean_over(weight, loss)),
            interval_fixed=interval(lambda weight: mean_over(weight, other)),
            ratio=float(loss.mean() / other.mean()),
            ratio_interval=interval(lambda weight: mean_over(weight, loss) / mean_over(weight, other)),
            difference_interval=interval(lambda weight: mean_over(weight, loss - other)),
            nll_full=float(whole.mean()),
            documents=len(set(owners)),
        )

    def longer(self, kind: str, length: int, windows: Tensor, footprint: float) -> LongerRow:
        """Read windows `[windows, tokens]` beyond the length for which the budget was planned."""
        budget = Budget(footprint=footprint, plan=length)
        key, first = [asdict(budget), "longer"], windows.shape[1] - 1

        def beyond(tokens: Tensor) -> dict[str, float]:
            return self._read(tokens, first, budget=budget)

        read = [self._measured(key, tokens, beyond) for tokens in windows]
        times = (windows.shape[1] - 1) / length
        return LongerRow(kind, length, windows.shape[1] - 1, footprint, [each["held"] * times for each in read])

    def _measured(self, key: list[Any], tokens: Tensor, measure: Callable[[Tensor], Any]) -> Any:
        return self.cells.measured([*key, len(tokens), digest(tokens)], lambda: measure(tokens))

    def _at_fixed_price(self, tokens: Tensor, first: int, held: float) -> dict[str, float]:
        """Read a window at the fixed price that holds as much at its end.

        The price is solved on the keys of a full cache. Under eviction they differ, so what a first price really held
        corrects the second.
        """
        calibration = Calibration.measure(self.lm.model, self.gates, tokens[None], len(tokens) - 2)
        tried: list[dict[str, float]] = []
        target = held
        for _ in range(2):
            try:
                solved = solve(self.policy, min(1.0, target), calibration)
            except FootprintOutOfReach:
                break
            tried.append(self._read(tokens, first, solved))
            if abs(tried[-1]["held"] / held - 1) <= CLOSE:
                break
            target *= held / tried[-1]["held"]
        if not tried:
            raise SmartKVError(f"no price keeps {held:.3f} of a window of {len(tokens)} tokens: give larger footprints")
        return min(tried, key=lambda each: abs(each["held"] - held))

    def _read(
        self, tokens: Tensor, first: int, policy: HybridPolicy | None = None, budget: Budget | None = None
    ) -> dict[str, float]:
        """Read a window at a fixed price, or under a budget."""
        options: dict[str, Any] = {} if budget is None else {"footprint": budget.footprint, "plan": budget.plan}
        chosen = self.policy if policy is None else replace(policy, name="fixed")
        with LifespanCache(
            self.lm.model, self.gates, chosen, first_query=query_before(first), rollback=0, **options
        ) as cache:
            nll = window_nll(self.lm.model, tokens, first, cache)
            cache.settle()
        return {"nll": nll, "footprint": cache.footprint, "held": held_share(self.lm, cache, len(tokens) - 1)}
