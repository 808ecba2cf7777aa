"""What a softly evicted model loses beside itself with a full cache, and what it keeps: the loss that distils gates.

The gates' output is read as the log of what a key is worth, in nats a token for the whole cache; the price of keeping
is a figure in the same unit. A key may be judged for several ages: its worth from 16 to 64 tokens on, from 64 to 256,
and so on. By the share `sigmoid((worth − price) / temperature)` it is kept from each age on, and the loss is

    KL(full cache ‖ softly evicted) + exp(price) · footprint

with another price for every window: one training serves every footprint, and the policy's price is solved afterwards.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartkv.errors import SmartKVError
from smartkv.gates import GateBank
from smartkv.objectives import FutureAttention, reading

AT_ONCE = 128  # tokens whose logits are held together: vocabularies are large


class _Divergence(torch.autograd.Function):
    """The gradient is made in the forward pass, block by block: logits of all tokens never stand side by side."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gradient, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), AT_ONCE):
            here = slice(start, start + AT_ONCE)
            ours = F.linear(hidden[here], weight, bias).float().log_softmax(dim=-1)
            theirs = F.linear(teacher[here], weight, bias).float().log_softmax(dim=-1)
            likely = theirs.exp()
            total += (likely * (theirs - ours)).sum()
            gradient[here] = (ours.exp() - likely).div_(len(hidden)).to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def divergence(hidden: Tensor, teacher: Tensor, head: nn.Module) -> Tensor:
    """Mean KL divergence of next-token distributions from the teacher's, nats a token; its gradient flows to `hidden`.

    Args:
        hidden, teacher: last hidden states `[tokens, hidden]`, the model's dtype.
        head: the model's output embedding, a Linear; not trained.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    found: Tensor = _Divergence.apply(hidden, teacher, weight, bias)
    return found


def keep_share(worth: Tensor, price: float | Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Share of each key that is kept from each age on, and its log.

    What is gone does not come back: the share at an age is the product of what stayed at each age so far.

    Args:
        worth: log of nats, `[…, ages]`.
        price: in the same unit.

    Returns:
        Two float32 tensors shaped like `worth`.
    """
    log = F.logsigmoid((worth.float() - price) / temperature).cumsum(dim=-1)
    return log.exp(), log


def stays(worth: Tensor, price: float | Tensor) -> Tensor:
    """The same where keys stay or go, as in the cache: bool, shaped like `worth`."""
    return worth.cummin(dim=-1).values > price


@torch.no_grad()
def plain(gates: GateBank) -> GateBank:
    """Gates whose outputs are scores by themselves: those of future attention are its log, others come with one output.

    Raises:
        SmartKVError: gates of several outputs that are no log of anything, such as of ordinal ages.
    """
    objective = reading(gates.details.get("target", ""), gates.details.get("objective", {}))
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
def for_ages(gates: GateBank, ages: Sequence[int], hidden: int) -> GateBank:
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


def queries_at(tokens: int, ages: Sequence[int], sinks: int, first: int, device: torch.device | None = None) -> Tensor:
    """How many of the queries `first ≤ i < tokens` see each key at each age and before the next, int64
    `[tokens, ages]`; sinks: 0."""
    key = torch.arange(tokens, device=device)[:, None]
    since = torch.tensor(ages, device=device)
    older = (tokens - (key + since).clamp(min=first)).clamp(min=0)
    at = torch.cat([older[:, :-1] - older[:, 1:], older[:, -1:]], dim=1)
    return at.masked_fill(key < sinks, 0)


def footprint(keep: Tensor, ages: Sequence[int], sinks: int, first: int) -> Tensor:
    """Share of a full cache's keys that the queries from `first` on see: sinks and what is younger than the first age
    in full, others by `keep`.

    Args:
        keep: `[heads, tokens, ages]`, of all heads of all layers.
    """
    tokens = keep.shape[1]
    old = queries_at(tokens, ages, sinks, first, keep.device)
    full = (torch.arange(first, tokens, device=keep.device) + 1).sum()
    in_full = full - old.sum()
    return (in_full + (keep * old).sum(dim=(1, 2)).mean()) / full
