"""Arguments that caches, calibration and solving share: gates, a policy, a footprint, in every form a user may give.

One of a wrong type is refused in one line that says what was expected, what came, and what to write instead.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import EXAMPLE
from smartkv.io.checks import describe
from smartkv.models.wrappers import key_devices
from smartkv.policies.figures import is_number
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import NAMED, read_policy

_AS_IDS = "encode a text with tokenizer(text, return_tensors='pt').input_ids[0]"


def resolve_gates(model: PreTrainedModel, gates: Any) -> GateBank | None:
    """Return the gates of a model, loaded where only their name is given.

    Args:
        model: the loaded model that the gates serve.
        gates: a GateBank on the model's device; or a name of `pretrained_gates()`, a folder or a hub id, from which
            gates are loaded onto the model's device; or None.

    Raises:
        SmartKVError: a wrong type, gates that cannot be loaded, or gates of another architecture or on another device.
    """
    check_gates(gates)
    if isinstance(gates, str | Path):
        return GateBank.from_pretrained(gates, model).to(key_devices(model)[0])
    if gates is not None:
        gates.check(model)
    return gates


def check_gates(gates: Any) -> None:
    """Check that gates are a GateBank, a name, a folder, or None.

    Raises:
        SmartKVError: they have a wrong type, or are the name of a policy.
    """
    misplaced_policy = isinstance(gates, str) and gates in NAMED and not Path(gates).is_dir()
    if gates is None or (isinstance(gates, GateBank | str | Path) and gates != "" and not misplaced_policy):
        return
    advice = f"for example gates='{EXAMPLE}'"
    if isinstance(gates, str | Path) and not misplaced_policy:  # ""
        advice = f"give a name, {advice}, or gates=None for a policy that needs none"
    elif misplaced_policy:
        advice = f"this is the name of a policy, write policy='{gates}'"
    elif isinstance(gates, HybridPolicy):
        advice = "write policy=… for a policy"
    elif is_number(gates):
        advice = f"for a share of the full cache write footprint={gates}"
    elif isinstance(gates, dict):
        advice = "load gates with GateBank.from_pretrained(folder)"
    raise SmartKVError(
        f"gates must be a GateBank, or the name, folder or hub id of gates, got {describe(gates)}: {advice}"
    )


def resolve_policy(policy: Any, layers: int) -> HybridPolicy:
    """Return a policy, read where only its name or its file is given.

    Args:
        policy: a HybridPolicy; or the name of a policy or a YAML file (see `read_policy`).
        layers: number of layers of the model.

    Raises:
        SmartKVError: a wrong type, or neither a name nor a file that holds a policy.
    """
    check_policy(policy)
    return policy if isinstance(policy, HybridPolicy) else read_policy(policy, layers)


def check_policy(policy: Any) -> None:
    """Check that a policy is a HybridPolicy, or its name or file.

    Raises:
        SmartKVError: it has a wrong type.
    """
    if isinstance(policy, HybridPolicy | str | Path):
        return
    advice = "for example policy='full'"
    if is_number(policy):
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


def check_footprint(footprint: Any) -> None:
    """Check that a footprint is a share of a cache.

    Raises:
        SmartKVError: it is none.
    """
    if not (is_number(footprint) and 0 < footprint <= 1):
        raise SmartKVError(
            "footprint must be the share of the full cache's keys to keep, above 0 and at most 1, "
            f"got {describe(footprint)}: for a quarter write footprint=0.25"
        )


def check_first_query(position: Any) -> int:
    """Return the position of the first counted query.

    Raises:
        SmartKVError: not a whole number, 0 or more.
    """
    if type(position) is not int or position < 0:
        raise SmartKVError(f"first_query must be a position in the text, 0 or more, got {describe(position)}")
    return position


def example_gates(gates: Any) -> str:
    """Return the gates in the example call of a message."""
    return "gates" if gates is not None else f"gates='{EXAMPLE}'"


def check_counted(lengths: list[int], first_query: int) -> int:
    """Return the length of windows, in tokens, after checking that a query of them counts."""
    check_first_query(first_query)
    if not lengths or lengths[0] - 1 <= first_query:
        got = f"windows of {lengths[0]}" if lengths else "none"
        raise SmartKVError(f"calibration needs windows of more than {first_query + 1} tokens, got {got}")
    return lengths[0]


def check_windows(windows: Any, vocabulary: int) -> list[Tensor]:
    """Return windows of token ids as a list.

    Args:
        windows: as `Calibration.measure` takes them.
        vocabulary: number of tokens that the model knows.

    Raises:
        SmartKVError: they are something else, of unequal lengths, or hold ids that the model does not know.
    """
    expected = "windows must be a list of token ids, integer tensors [tokens] of one length"
    if isinstance(windows, Tensor) and windows.dim() < 2:
        raise SmartKVError(f"{expected}, got one tensor {list(windows.shape)}: write windows=[ids]")
    if isinstance(windows, str | Mapping) or not isinstance(windows, Iterable):
        raise SmartKVError(f"{expected}, got {describe(windows)}: {_AS_IDS}")
    ids = list(windows)
    for window in ids:
        if not isinstance(window, Tensor):
            raise SmartKVError(f"{expected}, got {describe(window)} among them: {_AS_IDS}")
        if window.dim() != 1:
            raise SmartKVError(f"{expected}, got one of shape {list(window.shape)}: give its rows, such as ids[0]")
        if window.is_floating_point() or window.is_complex() or window.dtype == torch.bool:
            raise SmartKVError(f"{expected}, got {str(window.dtype).removeprefix('torch.')}: {_AS_IDS}")
        if len(window) != len(ids[0]):
            raise SmartKVError(
                f"{expected}, got {len(ids[0])} and {len(window)} tokens: cut them to the shorter length"
            )
        if len(window) and not (int(window.min()) >= 0 and int(window.max()) < vocabulary):
            raise SmartKVError(
                f"token ids of this model go from 0 to {vocabulary - 1}, got {int(window.min())} to "
                f"{int(window.max())}: use the model's own tokenizer"
            )
    return ids
