"""What a sparse student loses: cross entropy, divergence from a full-cache teacher, distance of hidden states.

Logits of all tokens never stand side by side: gradients are made block by block in the forward pass, for a head that is
not trained itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE = 128  # tokens whose logits are held together


class StudentLoss(NamedTuple):
    """Means over tokens, nats; `total` has the gradient.

    Attributes:
        total: cross entropy and divergence, weighted.
        ce: −log p of the next token.
        kl: KL(student ‖ teacher); 0 where it has no weight.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor | None, targets: Tensor, weight: Tensor, bias: Tensor | None,
        ce_weight: float, kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        gradient, tokens = torch.empty_like(hidden), len(hidden)
        ce, kl = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
        for start in range(0, tokens, AT_ONCE):
            here = slice(start, start + AT_ONCE)
            ours = F.linear(hidden[here], weight, bias).float().log_softmax(dim=-1)
            ce -= ours.gather(1, targets[here, None]).sum()
            likely = ours.exp()
            grad = ce_weight * likely
            grad.scatter_add_(1, targets[here, None], torch.full_like(grad[:, :1], -ce_weight))
            if teacher is not None:
                theirs = F.linear(teacher[here], weight, bias).float().log_softmax(dim=-1)
                gap = ours - theirs
                each = (likely * gap).sum(dim=-1, keepdim=True)
                kl += each.sum()
                grad += kl_weight * likely * (gap - each)
            gradient[here] = (grad / tokens).to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        ce, kl = ce / tokens, kl / tokens
        return ce_weight * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None, None


def student_loss(
    hidden: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    head: nn.Module,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
) -> StudentLoss:
    """Loss of next-token distributions.

    Args:
        hidden, teacher: last hidden states `[tokens, hidden]`, the model's dtype; no teacher: no divergence.
        targets: int64 `[tokens]`, the next tokens.
        head: the model's output embedding, a Linear; not trained.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    used = teacher if kl_weight else None
    return StudentLoss(*_Loss.apply(hidden, used, targets, weight, bias, ce_weight, kl_weight))


def hidden_distance(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of last hidden states, over the teacher's mean square."""
    return (hidden.float() - teacher.float()).square().mean() / teacher.float().square().mean()
