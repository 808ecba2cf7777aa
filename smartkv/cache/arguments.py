"""Constructor arguments of the caches: a model, gates, a policy and a footprint, in every form that a user may give.

Everything here runs before a cache touches its model. An argument of the wrong type is refused in one line that says
what was expected, what came, and what to write instead.
"""

from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, check_model
from smartkv.policies.arguments import check_footprint, check_gates, check_policy, example_gates, resolve_gates
from smartkv.policies.budgets import how_to_solve, policy_of
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.named import read_policy


def resolve_arguments(
    model: Any, gates: Any, policy: Any, footprint: Any
) -> tuple[Architecture, GateBank | None, HybridPolicy]:
    """Return the architecture, the gates and the policy of a cache that evicts.

    Args:
        model: a loaded causal LM.
        gates: as in `resolve_gates`.
        policy: a HybridPolicy; the name of a policy or a YAML file (see `read_policy`); or None: `footprint` decides.
        footprint: share of the full cache's keys to keep, for which the gates remember a policy (see `policy_of`); or
            None: the policy decides.

    Returns:
        The architecture; the gates, or None; and the policy, in which nothing is open.

    Raises:
        FootprintOutOfReach: the gates remember no price for this footprint.
        SmartKVError: an argument of a wrong type, neither a policy nor a footprint, both of them, a policy with
            something open, or gates and a policy that do not fit the model.
    """
    architecture = check_model(model)
    check_gates(gates)
    if policy is not None:
        check_policy(policy)
    if footprint is not None:
        check_footprint(footprint)
    if policy is None and footprint is None:
        raise SmartKVError(
            "expected a policy or a footprint, got neither: for example "
            f"LifespanCache(model, {example_gates(gates)}, footprint=0.25) keeps a quarter of the keys"
        )
    if policy is None and gates is None:
        raise SmartKVError(
            f"footprint={footprint:g} needs gates that choose the keys to keep, got none: for example "
            f"LifespanCache(model, {example_gates(None)}, footprint={footprint:g})"
            + (", or policy='full', which keeps all of them" if footprint == 1 else "")
        )
    if isinstance(policy, str | Path):
        given, policy = f"read_policy('{policy}', {architecture.layers})", read_policy(policy, architecture.layers)
    else:
        given = "policy"
    if policy is not None and policy.gated and gates is None:
        policy.check(architecture, None)  # says that it asks gates, which comes before any open figure
    if policy is not None and policy.open:
        solving = how_to_solve(footprint, given, "None" if gates is None else "gates")
        advice = f"give it a value, or solve it on your own text, {solving}"
        if footprint is not None:
            alone = "" if gates is None else "leave out policy, so that the gates' own policy keeps that share, or "
            advice = (
                f"footprint={footprint:g} beside it does not solve it; {alone}leave out footprint and solve the policy "
                f"on your own text, {solving}"
            )
        raise SmartKVError(f"policy '{policy.name}' leaves its {policy.open} open: {advice}")
    if policy is not None and footprint is not None:
        raise SmartKVError(
            f"policy '{policy.name}' already decides what is kept, footprint={footprint:g} cannot change that: "
            "give one of the two, so leave out footprint"
            + ("" if gates is None else ", or leave out policy for the policy that the gates remember")
        )
    bank = resolve_gates(model, gates)
    if policy is None and bank is not None:
        policy = policy_of(bank, footprint)
    policy.check(architecture, bank)
    return architecture, bank, policy
