"""What a softly evicted model loses beside itself with a full cache, and what it keeps: the loss that distils gates.

The gates' output is read as the log of what a key is worth, in nats a token for the whole cache; the price of keeping
is a figure in the same unit. A key may be judged for several ages: its worth from 16 to 64 tokens on, from 64 to 256,
and so on. By the share `sigmoid((worth − price) / temperature)` it is kept from each age on, and the loss is

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
