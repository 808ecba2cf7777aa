"""KL divergence and its gradient against plain torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smartkv.distillation.kl_divergence import divergence


@pytest.mark.parametrize("bias", [False, True])
def test_divergence_and_its_gradient_are_torch_s(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartkv.distillation.kl_divergence.AT_ONCE", 4)
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=bias)
    hidden, teacher = torch.randn(11, 8, requires_grad=True), torch.randn(11, 8)
    got = divergence(hidden, teacher, head)
    student, teacher_log = head(hidden).log_softmax(-1), head(teacher).log_softmax(-1)
    want = F.kl_div(student, teacher_log, reduction="batchmean", log_target=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(3 * got, hidden)[0], torch.autograd.grad(3 * want, hidden)[0], atol=1e-6, rtol=1e-4
    )
    assert divergence(teacher, teacher, head).item() == pytest.approx(0, abs=1e-6)
