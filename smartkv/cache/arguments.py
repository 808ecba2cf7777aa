"""Constructor arguments of the caches: a model, gates, a policy and a budget, in every form that a user may give.

Everything here runs before a cache touches its model. An argument of the wrong type is refused in one line that says
what was expected, what came, and what to write instead.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, check_model
from smartkv.policies.arguments import check_footprint, check_gates, check_policy, example_gates, resolve_gates
from smartkv.policies.budgets import how_to_solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from smartkv.policies.planned_budget import Budget, parse_bytes

WINDOW = 16  # latest tokens that always stay, where gates remember no policy of their own


def resolve_arguments(
    model: Any,
    gates: Any,
    policy: Any,
    footprint: Any = None,
    max_tokens: Any = None,
    max_bytes: Any = None,
    plan: Any = None,
) -> tuple[Architecture, GateBank | None, HybridPolicy, Budget | None]:
    """Return the architecture, the gates, the policy and the budget of a cache that evicts.

    Args:
        model: a loaded causal LM.
        gates: as in `resolve_gates`.
        policy: a HybridPolicy; the name of a policy or a YAML file (see `read_policy`); or None: the one that the gates
            remember, whose price floats.
        footprint, max_tokens, max_bytes, plan: as in `Budget`; all None: the policy decides.

    Returns:
        The architecture; the gates, or None; the policy; and the budget, or None where nothing in the policy is open.

    Raises:
        SmartKVError: an argument of a wrong type, neither a policy nor a budget, a budget beside a policy that already
            decides, two budgets, a policy with something open that no budget closes, or gates and a policy that do not
            fit the model.
    """
    architecture = check_model(model)
    check_gates(gates)
    if policy is not None:
        check_policy(policy)
    budget = budget_of(footprint, max_tokens, max_bytes, plan)
    if policy is None and budget is None:
        raise SmartKVError(
            "expected a policy or a budget, got neither: for example "
            f"LifespanCache(model, {example_gates(gates)}, footprint=0.25) keeps a quarter of the keys"
        )
    if policy is None and gates is None:
        raise SmartKVError(
            f"{budget} needs gates that choose the keys to keep, got none: for example "
            f"LifespanCache(model, {example_gates(None)}, {budget})"
            + (", or policy='full', which keeps all of them" if footprint == 1 else "")
        )
    if isinstance(policy, str | Path):
        given, policy = f"read_policy('{policy}', {architecture.layers})", read_policy(policy, architecture.layers)
    else:
        given = "policy"
    if policy is not None and policy.gated and gates is None:
        policy.check(architecture, None)  # says that it asks gates, which comes before any open figure
    if policy is not None:
        check_open(policy, budget, given, gates)
    bank = resolve_gates(model, gates)
    if policy is None:
        policy = own_policy(bank)
    policy.check(architecture, bank)
    return architecture, bank, policy, budget


def budget_of(footprint: Any, max_tokens: Any, max_bytes: Any, plan: Any) -> Budget | None:
    """Return the budget that a user gives; None: none.

    Args:
        footprint, max_tokens, max_bytes, plan: as in `Budget`, in every form that a user may give.

    Raises:
        SmartKVError: two figures, a plan without any, or a figure that is out of range.
    """
    if footprint is not None:
        check_footprint(footprint)
    figures = {"footprint": footprint, "max_tokens": max_tokens, "max_bytes": max_bytes}
    given = [name for name, figure in figures.items() if figure is not None]
    if len(given) > 1:
        raise SmartKVError(f"{' and '.join(given)} both say how much may be kept: give one of them")
    if not given:
        if plan is not None:
            raise SmartKVError(f"plan={plan} is the length for a budget, and none was given: add footprint=0.25")
        return None
    return Budget(max_tokens, None if max_bytes is None else parse_bytes(max_bytes), footprint, plan)


def check_open(policy: HybridPolicy, budget: Budget | None, given: str, gates: Any) -> None:
    """Check that a policy leaves its price open where there is a budget, and else nothing.

    Args:
        policy: the policy.
        budget: the budget, or None.
        given: the policy's Python expression.
        gates: as the user gave them.
    """
    own_prices = any(rule.price is not None for rule in policy.rules)
    if policy.open == (None if budget is None else "price") and not (budget is not None and own_prices):
        return
    footprint = None if budget is None else budget.footprint
    if policy.open is not None and not (budget is not None and policy.open == "price"):
        solving = how_to_solve(footprint, given, "None" if gates is None else "gates")
        advice = f"give it a value, or solve it on your own text, {solving}"
        if budget is not None:
            alone = "" if gates is None else "leave out policy, so that the gates' own policy holds that budget, or "
            advice = (
                f"{budget} beside it does not solve it; {alone}leave out {budget.argument} and solve the policy "
                f"on your own text, {solving}"
            )
        raise SmartKVError(f"policy '{policy.name}' leaves its {policy.open} open: {advice}")
    name = "the budget" if budget is None else budget.argument
    raise SmartKVError(
        f"policy '{policy.name}' already decides what is kept, {budget} cannot change that: "
        f"give one of the two, so leave out {name}"
        + ("" if gates is None else ", or leave out policy for the policy that the gates remember")
    )


def own_policy(gates: GateBank | None) -> HybridPolicy:
    """Return the policy that gates remember, with its price open; else one that gates every layer."""
    remembered = None if gates is None else gates.details.get("policy")
    if remembered is None:
        return HybridPolicy((LayerRule("all", "gated", WINDOW),), name="all-gated")
    return replace(HybridPolicy.from_dict(remembered), price=None, multiple=math.inf)
