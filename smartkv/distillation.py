"""What a softly evicted model loses beside itself with a full cache, and what it keeps: the loss that distils gates.

The gates' output is read as the log of what a key is worth, in nats a token for the whole cache; the price of keeping
is a figure in the same unit. A key is kept by the share `sigmoid((worth − price) / temperature)`, and the loss is

    KL(full cache ‖ softly evicted) + exp(price) · footprint

with another price for every window: one training serves every footprint, and the policy's price is solved afterwards.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """Share of each key that is kept beyond the window, and its log; shaped like `worth` (log of nats)."""
    logit = (worth.float() - price) / temperature
    return torch.sigmoid(logit), F.logsigmoid(logit)


def queries_beyond(tokens: int, window: int, sinks: int, first: int, device: torch.device | None = None) -> Tensor:
    """How many of the queries `first ≤ i < tokens` see each key no longer in full, int64 `[tokens]`; sinks: 0."""
    key = torch.arange(tokens, device=device)
    beyond = (tokens - (key + window).clamp(min=first)).clamp(min=0)
    return beyond.masked_fill(key < sinks, 0)


def footprint(keep: Tensor, window: int, sinks: int, first: int) -> Tensor:
    """Share of a full cache's keys that the queries from `first` on see: windows and sinks in full, others by `keep`.

    Args:
        keep: `[heads, tokens]`, of all heads of all layers.
    """
    tokens = keep.shape[-1]
    beyond = queries_beyond(tokens, window, sinks, first, keep.device)
    full = (torch.arange(first, tokens, device=keep.device) + 1).sum()
    in_full = full - beyond.sum()
    return (in_full + (keep * beyond).sum(dim=-1).mean()) / full
