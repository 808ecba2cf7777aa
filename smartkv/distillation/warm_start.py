"""Gates to start distillation from: trained gates, widened to one output per age."""

import copy
import math
from collections.abc import Sequence

import torch

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import FutureAttention, objective_of_target


@torch.no_grad()
def single_output(gates: GateBank) -> GateBank:
    """Turn gates into gates whose outputs are scores by themselves.

    Gates for future attention get the log of the attention as output. Gates with one output and gates that judge by
    age are returned unchanged.

    Raises:
        SmartKVError: The gates have several outputs that are not scores, such as those for ordinal ages.
    """
    objective = objective_of_target(gates.details.get("target", ""), gates.details.get("objective", {}))
    if gates.ages or (objective is None and gates.outputs == 1):
        return gates
    if not isinstance(objective, FutureAttention):
        target = gates.details.get("target")
        raise SmartKVError(
            f"distillation starts from gates with one output or from gates for future attention, got gates for "
            f"'{target}': train gates with another objective"
        )
    bank = copy.deepcopy(gates)
    bank.bias2.sub_(math.log(objective.scale))
    bank.details = {"sinks": gates.details.get("sinks", 4)}
    return bank


@torch.no_grad()
def one_output_per_age(gates: GateBank, ages: Sequence[int], hidden: int) -> GateBank:
    """Make gates that judge by age, as a start for distillation.

    From gates with one output, the new gates give that output at the last age. At a younger age they add half the log
    of the ratio of the two ages, since attention falls roughly with age.

    Args:
        gates: Gates with one output, or with one output per age, which are kept.
        ages: Ages in tokens, ascending.
        hidden: Width of the hidden layer, a multiple of that of `gates`. Units are copied to fill it, with noise of a
            hundredth of the weights' standard deviation, so that the copies can learn different things.

    Raises:
        SmartKVError: The width is not a multiple.
    """
    times = hidden // gates.hidden
    if times * gates.hidden != hidden or times < 1:
        raise SmartKVError(f"hidden must be a multiple of the {gates.hidden} hidden units of the gates, got {hidden}")
    bank = GateBank(gates.fingerprint, gates.layers, hidden, len(ages), gates.details | {"ages": list(ages)}).to(
        gates.device
    )
    bank.weight1.copy_(gates.weight1.repeat(1, 1, times))
    bank.bias1.copy_(gates.bias1.repeat(1, 1, times))
    if times > 1:
        # Drawn on the CPU, also where Lightning sets another default device, so that the noise is always the same.
        noise = torch.randn(bank.weight1.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        noise = noise.to(gates.device)
        bank.weight1.add_(noise * bank.weight1.std(dim=(1, 2), keepdim=True) / 100)
    bank.weight2.copy_(gates.weight2.repeat(1, times, 1) / times)
    bank.bias2.copy_(gates.bias2)
    if gates.outputs == 1:
        bank.bias2.add_((ages[-1] / torch.tensor(ages, device=gates.device)).log() / 2)
    return bank
