"""Losses of a student that attends under eviction: cross entropy, divergence from a teacher, distance of states.

The teacher attends with a full cache. Gradients are computed a few tokens at a time in the forward pass, so that the
logits of all tokens are never in memory together. The output embedding is not trained.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE = 128  # tokens whose logits are in memory together


class StudentLoss(NamedTuple):
    """Mean losses over tokens, in nats, float32 scalars.

    Attributes:
        total: Weighted sum of cross entropy and divergence, which has the gradient.
        ce: Cross entropy with the next token.
        kl: KL(student ‖ teacher); 0 if it has no weight or there is no teacher.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor


class _Loss(torch.autograd.Function):
    """Weighted loss whose gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor | None, targets: Tensor, weight: Tensor, bias: Tensor | None,
        ce_weight: float, kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        gradient, tokens = torch.empty_like(hidden), len(hidden)
        ce, kl = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
        for start in range(0, tokens, AT_ONCE):
            block = slice(start, start + AT_ONCE)
            student_log = F.linear(hidden[block], weight, bias).float().log_softmax(dim=-1)
            ce -= student_log.gather(1, targets[block, None]).sum()
            probability = student_log.exp()
            d_logits = ce_weight * probability
            d_logits.scatter_add_(1, targets[block, None], torch.full_like(d_logits[:, :1], -ce_weight))
            if teacher is not None:
                teacher_log = F.linear(teacher[block], weight, bias).float().log_softmax(dim=-1)
                log_ratio = student_log - teacher_log
                kl_of_token = (probability * log_ratio).sum(dim=-1, keepdim=True)
                kl += kl_of_token.sum()
                d_logits += kl_weight * probability * (log_ratio - kl_of_token)
            gradient[block] = (d_logits / tokens).to(hidden.dtype) @ weight
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
    """Compute cross entropy and divergence of next-token distributions.

    Args:
        hidden: Last hidden states of the student, `[tokens, hidden]`, in the model's dtype. The gradient flows to them.
        teacher: Last hidden states of the teacher, `[tokens, hidden]`. None means no divergence.
        targets: Next tokens, int64 `[tokens]`.
        head: The model's output embedding, a linear layer, which is not trained.
        ce_weight: Weight of the cross entropy.
        kl_weight: Weight of the divergence.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    used = teacher if kl_weight else None
    return StudentLoss(*_Loss.apply(hidden, used, targets, weight, bias, ce_weight, kl_weight))


def hidden_distance(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared distance of last hidden states, relative to the teacher's mean square.

    Args:
        hidden: Last hidden states of the student, `[tokens, hidden]`.
        teacher: Last hidden states of the teacher, `[tokens, hidden]`.

    Returns:
        A float32 scalar.
    """
    return (hidden.float() - teacher.float()).square().mean() / teacher.float().square().mean()
