"""What the cache of a conversation keeps: a policy and, where its price floats, a budget."""

import math
from dataclasses import dataclass, replace

from eval.common.score_scale import ScoreScale
from smartkv.cache.arguments import budget_of, own_policy
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates
from smartkv.models.architecture import Architecture
from smartkv.policies.arguments import check_footprint
from smartkv.policies.budgets import Calibration, solve, solved_details
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from smartkv.policies.planned_budget import Budget

CHAT_PLAN = 2048  # tokens of a conversation, whose length nobody knows beforehand
A_QUARTER = 0.25  # the footprint, where nothing says how much may be kept


@dataclass(frozen=True)
class Choice:
    """What the options of the command ask for.

    Attributes:
        policy: its price is open under a budget.
        budget: what the cache may hold; None: the policy alone decides.
        footprint: share of the full cache's keys for which an open figure is solved, where there is no budget.
        gates: None: there are none.
    """

    policy: HybridPolicy
    budget: Budget | None
    footprint: float
    gates: GateBank | None

    @property
    def needs_texts(self) -> bool:
        """Whether something is to be solved on texts: an open figure, or what each layer gets of the budget."""
        if self.budget is None:
            return self.policy.open is not None
        return self.gates is not None and "layer_shares" not in self.gates.details

    def solved(self, calibration: Calibration) -> "Choice":
        """Solve what `needs_texts` says. The gates then remember what each layer gets.

        Raises:
            FootprintOutOfReach: no figure keeps the footprint.
        """
        if self.budget is None:
            return replace(self, policy=solve(self.policy, self.footprint, calibration))
        if self.gates is not None:
            self.gates.details["layer_shares"] = solved_details(self.policy, calibration)["layer_shares"]
        return self

    def describe(self, scale: ScoreScale, gates: str | None) -> str:
        """Return the choice in words, prices in the unit of the gates."""
        gated = [rule for rule in self.policy.rules if rule.rule == "gated"]
        windows = sorted({rule.window for rule in self.policy.rules if rule.window is not None})
        prices = {price for rule in gated if (price := self._price(rule)) is not None and math.isfinite(price)}
        parts = [f"policy {self.policy.name}"]
        if gated:
            parts.append(f"gates {gates}")
        if windows:
            parts.append(f"window {windows[0]}" if len(windows) == 1 else f"windows {windows[0]}-{windows[-1]}")
        if self.budget is not None:
            planned = "" if self.budget.plan is None else f" of {self.budget.plan:,} tokens"
            parts.append(f"budget {self.budget}{planned if self.budget.footprint else ''}")
        return ", ".join([*parts, *map(scale.describe_price, sorted(prices))])

    def _price(self, rule: LayerRule) -> float | None:
        return self.policy.price if rule.price is None else rule.price


def choose(
    name: str | None,
    price: float | None,
    footprint: float | None,
    max_tokens: int | None,
    max_bytes: int | str | None,
    plan: int | None,
    chat: bool,
    gates: GateBank | None,
    layers: int,
) -> Choice:
    """Choose a policy and a budget; arguments as of `eval.chat.generate.generate`.

    Raises:
        SmartKVError: two figures that say how much may be kept, one out of range, or one that the policy cannot hold.
    """
    if footprint is not None:
        check_footprint(footprint)
    given = footprint if max_tokens is not None or max_bytes is not None else footprint or A_QUARTER
    budget = budget_of(given, max_tokens, max_bytes, plan)
    if price is not None:
        if budget is not None and budget.footprint is None:
            raise SmartKVError(f"price={price:g} decides what stays, and {budget} would move it: give one of them")
        return Choice(_with_price(name, price, gates, layers), None, footprint or A_QUARTER, gates)
    if name is None and gates is not None:
        policy = own_policy(gates)
    else:
        policy = read_policy(name or "all-gated", layers)
        if max_tokens is None and max_bytes is None and plan is None:
            return Choice(policy, None, footprint or A_QUARTER, gates)
        if policy.open != "price":
            raise SmartKVError(
                f"policy '{policy.name}' leaves {policy.open or 'nothing'} open, and a budget ({budget}) moves the "
                "price: leave out the policy for the one that is stored with the gates"
            )
    if chat and budget is not None and budget.footprint is not None and plan is None:
        budget = replace(budget, plan=CHAT_PLAN)
    return Choice(policy, budget, footprint or A_QUARTER, gates)


def _with_price(name: str | None, price: float, gates: GateBank | None, layers: int) -> HybridPolicy:
    """Return the policy of a name, else the one stored with the gates, with a price that is given."""
    policy = own_policy(gates) if name is None else read_policy(name, layers)
    if not policy.gated:
        raise SmartKVError(f"policy '{policy.name}' asks no gates: it takes no price")
    return replace(policy, price=price)


def shipped_gates(architecture: Architecture) -> str | None:
    """Return the name of the gates that come with SmartKV for a model of this architecture; None: there are none."""
    shape = (architecture.model_type, architecture.layers, architecture.kv_heads, architecture.head_dim)
    for name in pretrained_gates():
        made_for = GateBank.from_pretrained(name).fingerprint
        if shape == (made_for.model_type, made_for.layers, made_for.kv_heads, made_for.head_dim):
            return name
    return None
