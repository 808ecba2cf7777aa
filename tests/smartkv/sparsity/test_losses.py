"""Losses of a student against plain torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smartkv.sparsity.losses import hidden_distance, student_loss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("ce_weight", "kl_weight"), [(1.0, 1.0), (0.0, 2.0), (1.0, 0.0)])
def test_the_loss_and_its_gradient_are_those_of_plain_torch(bias: bool, ce_weight: float, kl_weight: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden, teacher = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    targets = torch.randint(50, (300,))
    loss = student_loss(hidden, teacher, targets, head, ce_weight, kl_weight)
    (gradient,) = torch.autograd.grad(3 * loss.total, hidden)
    student, teacher_log = head(hidden).log_softmax(-1), head(teacher).log_softmax(-1)
    ce = F.nll_loss(student, targets)
    kl = (student.exp() * (student - teacher_log)).sum(-1).mean()  # KL(student ‖ teacher), a mean over tokens
    (want,) = torch.autograd.grad(3 * (ce_weight * ce + kl_weight * kl), hidden)
    assert torch.allclose(gradient, want, atol=1e-6)
    assert torch.allclose(loss.total, ce_weight * ce + kl_weight * kl, atol=1e-5)
    assert torch.allclose(loss.ce, ce, atol=1e-5)
    assert torch.allclose(loss.kl, kl if kl_weight else torch.zeros(()), atol=1e-5)


def test_hidden_states_are_as_far_apart_as_they_are() -> None:
    teacher = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert hidden_distance(teacher, teacher) == 0
    assert float(hidden_distance(2 * teacher, teacher)) == pytest.approx(1.0)


def test_without_a_teacher_the_loss_is_the_cross_entropy() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50).requires_grad_(False)
    hidden, targets = torch.randn(20, 16), torch.randint(50, (20,))
    loss = student_loss(hidden, None, targets, head)
    torch.testing.assert_close(loss.total, F.cross_entropy(head(hidden), targets))
    assert loss.kl == 0
