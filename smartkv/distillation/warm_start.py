"""Gates to start distillation from: a single output widened to one per age."""

import copy
import math
from collections.abc import Sequence

import torch

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import FutureAttention, objective_of_target


@torch.no_grad()
def single_output(gates: GateBank) -> GateBank:
    """Gates whose outputs are scores by themselves: those of future attention are its log, others come with one output.

    Raises:
        SmartKVError: gates of several outputs that are no log of anything, such as of ordinal ages.
    """
    objective = objective_of_target(gates.details.get("target", ""), gates.details.get("objective", {}))
    if gates.ages or (objective is None and gates.outputs == 1):
        return gates
    if not isinstance(objective, FutureAttention):
        target = gates.details.get("target")
        raise SmartKVError(f"distillation starts from gates with one output, or of future attention, not of '{target}'")
    bank = copy.deepcopy(gates)
    bank.bias2.sub_(math.log(objective.scale))
    bank.details = {"sinks": gates.details.get("sinks", 4)}
    return bank


@torch.no_grad()
def one_output_per_age(gates: GateBank, ages: Sequence[int], hidden: int) -> GateBank:
    """Gates that judge for `ages`, to start from. From one output: they judge each key as `gates` do for the last age,
    and more kindly the younger it is, since attention falls about with age; by half the log of it.

    Args:
        gates: with one output; or with one for each of the ages, which are kept.
        hidden: width of the hidden layer, a multiple of that of `gates`; copies of a unit are told apart by a
            hundredth of noise.

    Raises:
        SmartKVError: the width is no such multiple.
    """
    times = hidden // gates.hidden
    if times * gates.hidden != hidden or times < 1:
        raise SmartKVError(f"gates of {gates.hidden} hidden units can become a multiple of that wide, not {hidden}")
    bank = GateBank(gates.fingerprint, gates.layers, hidden, len(ages), gates.details | {"ages": list(ages)}).to(
        gates.device
    )
    bank.weight1.copy_(gates.weight1.repeat(1, 1, times))
    bank.bias1.copy_(gates.bias1.repeat(1, 1, times))
    if times > 1:
        # on the CPU whatever the default device is: Lightning builds models with another
        noise = torch.randn(bank.weight1.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        noise = noise.to(gates.device)
        bank.weight1.add_(noise * bank.weight1.std(dim=(1, 2), keepdim=True) / 100)
    bank.weight2.copy_(gates.weight2.repeat(1, times, 1) / times)
    bank.bias2.copy_(gates.bias2)
    if gates.outputs == 1:
        bank.bias2.add_((ages[-1] / torch.tensor(ages, device=gates.device)).log() / 2)
    return bank
