"""Constructor arguments of the caches: a model, gates, a policy and a footprint, in every form that a user may give.

Everything here runs before a cache touches its model. An argument of the wrong type is refused in one line that says
what was expected, what came, and what to write instead.
"""

from numbers import Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates
from smartkv.io.checks import describe
from smartkv.models.architecture import Architecture, check_model
from smartkv.models.wrappers import key_devices
from smartkv.policies.budgets import how_to_solve, policy_of
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import NAMED, read_policy


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
    _check_gates(gates)
    _check_policy(policy)
    _check_footprint(footprint)
    if policy is None and footprint is None:
        raise SmartKVError(
            "expected a policy or a footprint, got neither: for example "
            f"LifespanCache(model, {_example_gates(gates)}, footprint=0.25) keeps a quarter of the keys"
        )
    if policy is None and gates is None:
        raise SmartKVError(
            f"footprint={footprint:g} needs gates that choose the keys to keep, got none: for example "
            f"LifespanCache(model, {_example_gates(None)}, footprint={footprint:g})"
        )
    if isinstance(policy, str | Path):
        given, policy = f"read_policy('{policy}', {architecture.layers})", read_policy(policy, architecture.layers)
    else:
        given = "policy"
    if policy is not None and policy.open:
        raise SmartKVError(
            f"policy '{policy.name}' leaves its {policy.open} open: give it a value, or solve it on your own text, "
            f"{how_to_solve(footprint, given, 'None' if gates is None else 'gates')}"
        )
    if policy is not None and footprint is not None:
        raise SmartKVError(
            f"policy '{policy.name}' already decides what is kept, footprint={footprint:g} cannot change that: "
            "give one of the two"
        )
    bank = resolve_gates(model, gates)
    if policy is None and bank is not None:
        policy = policy_of(bank, footprint)
    policy.check(architecture, bank)
    return architecture, bank, policy


def resolve_gates(model: PreTrainedModel, gates: Any) -> GateBank | None:
    """Return the gates of a model, loaded where only their name is given.

    Args:
        model: the loaded model that the gates serve.
        gates: a GateBank on the model's device; or a name of `pretrained_gates()`, a folder or a hub id, from which
            gates are loaded onto the model's device; or None.

    Raises:
        SmartKVError: a wrong type, gates that cannot be loaded, or gates of another architecture or on another device.
    """
    _check_gates(gates)
    if isinstance(gates, str | Path):
        return GateBank.from_pretrained(gates, model).to(key_devices(model)[0])
    if gates is not None:
        gates.check(model)
    return gates


def check_first_query(position: Any) -> int:
    """Return the position of the first counted query.

    Raises:
        SmartKVError: not a whole number, 0 or more.
    """
    if type(position) is not int or position < 0:
        raise SmartKVError(f"first_query must be a position in the text, 0 or more, got {describe(position)}")
    return position


def _check_gates(gates: Any) -> None:
    """Refuse gates of a wrong type, and the name of a policy in their place."""
    misplaced_policy = isinstance(gates, str) and gates in NAMED and not Path(gates).is_dir()
    if gates is None or (isinstance(gates, GateBank | str | Path) and gates != "" and not misplaced_policy):
        return
    advice = f"for example gates='{pretrained_gates()[0]}'"
    if isinstance(gates, str | Path) and not misplaced_policy:  # ""
        advice = f"give a name, {advice}, or gates=None for a policy that needs none"
    elif misplaced_policy:
        advice = f"this is the name of a policy, write policy='{gates}'"
    elif isinstance(gates, HybridPolicy):
        advice = "write policy=… for a policy"
    elif _is_number(gates):
        advice = f"for a share of the full cache write footprint={gates}"
    elif isinstance(gates, dict):
        advice = "load gates with GateBank.from_pretrained(folder)"
    raise SmartKVError(
        f"gates must be a GateBank, or the name, folder or hub id of gates, got {describe(gates)}: {advice}"
    )


def _check_policy(policy: Any) -> None:
    """Refuse a policy of a wrong type."""
    if policy is None or isinstance(policy, HybridPolicy | str | Path):
        return
    advice = "for example policy='full'"
    if _is_number(policy):
        advice = f"for a share of the full cache write footprint={policy}"
    elif isinstance(policy, dict):
        advice = "read a mapping with HybridPolicy.from_dict(…)"
    elif isinstance(policy, LayerRule | list | tuple):
        advice = "write HybridPolicy((LayerRule(…),)) for rules"
    elif isinstance(policy, GateBank):
        advice = "write gates=… for gates"
    raise SmartKVError(
        f"policy must be a HybridPolicy, a YAML file or one of {', '.join(NAMED)}, got {describe(policy)}: {advice}"
    )


def _check_footprint(footprint: Any) -> None:
    """Refuse a footprint that is no share of a cache."""
    if footprint is not None and not (_is_number(footprint) and 0 < footprint <= 1):
        raise SmartKVError(
            "footprint must be the share of the full cache's keys to keep, above 0 and at most 1, "
            f"got {describe(footprint)}: for a quarter write footprint=0.25"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _example_gates(gates: Any) -> str:
    """The gates in an example call."""
    return "gates" if gates is not None else f"gates='{pretrained_gates()[0]}'"
