"""The loss that distils gates, against plain ways of computing it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from smartkv.distillation import divergence, footprint, keep_share, queries_beyond


@pytest.mark.parametrize("bias", [False, True])
def test_divergence_and_its_gradient_are_torch_s(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartkv.distillation.AT_ONCE", 4)
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=bias)
    hidden, teacher = torch.randn(11, 8, requires_grad=True), torch.randn(11, 8)
    got = divergence(hidden, teacher, head)
    ours, theirs = head(hidden).log_softmax(-1), head(teacher).log_softmax(-1)
    want = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(3 * got, hidden)[0], torch.autograd.grad(3 * want, hidden)[0], atol=1e-6, rtol=1e-4
    )
    assert divergence(teacher, teacher, head).item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 30),
    window=st.integers(1, 34),
    sinks=st.integers(0, 5),
    first=st.integers(0, 29),
    seed=st.integers(0, 99),
)
def test_the_footprint_is_what_queries_see(tokens: int, window: int, sinks: int, first: int, seed: int) -> None:
    first = min(first, tokens - 1)
    keep = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = full = 0.0
    beyond = [0] * tokens
    for i in range(first, tokens):
        for j in range(i + 1):
            in_full = i - j < window or j < sinks
            beyond[j] += not in_full
            seen += 1.0 if in_full else float(keep[:, j].mean())
            full += 1.0
    assert queries_beyond(tokens, window, sinks, first).tolist() == beyond
    assert float(footprint(keep, window, sinks, first)) == pytest.approx(seen / full)


def test_what_is_worth_its_price_is_half_kept_and_the_log_does_not_underflow() -> None:
    keep, log_keep = keep_share(torch.tensor([-3.0, 1.0, -200.0]), price=-3.0, temperature=0.5)
    assert keep[0] == 0.5 and keep[1] > 0.999
    torch.testing.assert_close(log_keep[:2], keep[:2].log())
    assert log_keep[2] == pytest.approx(-394)
