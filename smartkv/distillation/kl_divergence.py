"""The loss that distils gates: KL divergence of a softly evicted model from itself with a full cache.

A gate's output is the log of a key's worth, in nats per token for the whole cache. The price is in the same unit. A key
may be judged at several ages: for example one worth from 16 to 64 tokens, another from 64 to 256. From each age on the
key is kept by the share `sigmoid((worth − price) / temperature)`. The loss is

    KL(full cache ‖ softly evicted) + exp(price) · footprint

Every training window has another price. One training therefore serves every footprint, and the price of a policy is
solved afterwards.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE = 128  # tokens whose logits are in memory together, since vocabularies are large


class _Divergence(torch.autograd.Function):
    """KL divergence whose gradient is computed in the forward pass, a few tokens at a time.

    The logits of all tokens are never in memory together.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gradient, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), AT_ONCE):
            tokens = slice(start, start + AT_ONCE)
            student_log = F.linear(hidden[tokens], weight, bias).float().log_softmax(dim=-1)
            teacher_log = F.linear(teacher[tokens], weight, bias).float().log_softmax(dim=-1)
            teacher_probability = teacher_log.exp()
            total += (teacher_probability * (teacher_log - student_log)).sum()
            d_logits = (student_log.exp() - teacher_probability).div_(len(hidden))
            gradient[tokens] = d_logits.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def divergence(hidden: Tensor, teacher: Tensor, head: nn.Module) -> Tensor:
    """Compute the mean KL divergence KL(teacher ‖ student) of next-token distributions.

    Args:
        hidden: Last hidden states of the student, `[tokens, hidden]`, in the model's dtype. The gradient flows to them.
        teacher: Last hidden states of the teacher, `[tokens, hidden]`.
        head: The model's output embedding, a linear layer, which is not trained.

    Returns:
        A float32 scalar, in nats per token.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    mean: Tensor = _Divergence.apply(hidden, teacher, weight, bias)
    return mean
