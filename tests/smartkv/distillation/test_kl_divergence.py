"""The loss that distils gates, against plain ways of computing it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from smartkv.distillation.kl_divergence import divergence
from smartkv.distillation.soft_keep import footprint, hard_keep, keep_share, queries_per_age
from smartkv.distillation.warm_start import one_output_per_age, single_output
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import FutureAttention, OrdinalAges
from smartkv.models.architecture import Fingerprint


@pytest.mark.parametrize("bias", [False, True])
def test_divergence_and_its_gradient_are_torch_s(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartkv.distillation.kl_divergence.AT_ONCE", 4)
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
    ages=st.sets(st.integers(1, 34), min_size=1, max_size=3).map(sorted),
    sinks=st.integers(0, 5),
    first=st.integers(0, 29),
    seed=st.integers(0, 99),
)
def test_the_footprint_is_what_queries_see(tokens: int, ages: list[int], sinks: int, first: int, seed: int) -> None:
    first = min(first, tokens - 1)
    keep = torch.rand(3, tokens, len(ages), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = full = 0.0
    old = torch.zeros(tokens, len(ages), dtype=torch.int64)
    for i in range(first, tokens):
        for j in range(i + 1):
            reached = [number for number, age in enumerate(ages) if i - j >= age and j >= sinks]
            if reached:
                old[j, reached[-1]] += 1
            seen += float(keep[:, j, reached[-1]].mean()) if reached else 1.0
            full += 1.0
    assert torch.equal(queries_per_age(tokens, ages, sinks, first), old)
    assert float(footprint(keep, ages, sinks, first)) == pytest.approx(seen / full)


def test_what_is_worth_its_price_is_half_kept_and_the_log_does_not_underflow() -> None:
    keep, log_keep = keep_share(torch.tensor([[-3.0], [1.0], [-200.0]]), price=-3.0, temperature=0.5)
    assert keep[0] == 0.5 and keep[1] > 0.999
    torch.testing.assert_close(log_keep[:2], keep[:2].log())
    assert log_keep[2] == pytest.approx(-394)


def test_what_is_gone_at_one_age_is_gone_at_the_next() -> None:
    worth = torch.tensor([[2.0, -9.0, 2.0], [2.0, 2.0, 0.5], [-0.1, 3.0, 3.0]])
    assert hard_keep(worth, 0.0).tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    keep, log_keep = keep_share(worth, 0.0, 0.01)
    torch.testing.assert_close(keep, hard_keep(worth, 0.0).float(), atol=1e-4, rtol=0)
    assert (log_keep.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("hidden", [4, 12])
def test_gates_for_ages_start_as_the_gates_they_come_from_and_kinder_to_young_keys(hidden: int) -> None:
    torch.manual_seed(0)
    gates = GateBank(Fingerprint("llama", 2, 2, 8, "0"), hidden=4)
    aged = one_output_per_age(gates, (16, 64, 256), hidden)
    keys = torch.randn(1, 2, 50, 8)
    want, got = gates.predict(1, keys), aged.predict(1, keys)
    kinder = torch.tensor([math.log(4), math.log(2), 0.0])
    torch.testing.assert_close(got, want + kinder, atol=0.02 if hidden > 4 else 1e-6, rtol=0)
    assert aged.hidden == hidden and aged.ages == (16, 64, 256)
    if hidden > 4:  # the copies of a unit can learn different things
        assert not torch.equal(aged.weight1[..., :4], aged.weight1[..., 4:8])
    again = one_output_per_age(aged, (16, 64, 256), hidden)
    torch.testing.assert_close(again.predict(1, keys), got)


def test_gates_of_future_attention_start_as_its_log_at_each_age() -> None:
    objective = FutureAttention((16, 64, 256), scale=50.0)
    details = {"target": objective.target, "objective": objective.settings}
    gates = GateBank(Fingerprint("llama", 2, 2, 8, "0"), hidden=4, outputs=3, details=details)
    start, keys = single_output(gates), torch.randn(1, 2, 50, 8)
    mean_attention = gates.score(1, keys).exp()  # over the ages, as the objective reads it
    torch.testing.assert_close(start.predict(1, keys).exp().mean(dim=-1), mean_attention)
    aged = one_output_per_age(start, (16, 64, 256), 4)
    torch.testing.assert_close(aged.predict(1, keys), start.predict(1, keys))
    torch.testing.assert_close(start.score(1, keys), start.predict(1, keys)[..., 0])


def test_gates_of_ordinal_ages_are_no_start() -> None:
    details = {"target": OrdinalAges.target, "objective": {"ages": [4, 16, 64]}}
    with pytest.raises(SmartKVError, match="or of future attention, not of 'life beyond ages'"):
        single_output(GateBank(Fingerprint("llama", 1, 1, 8, "0"), hidden=4, outputs=3, details=details))


def test_a_width_that_is_no_multiple_is_refused() -> None:
    gates = GateBank(Fingerprint("llama", 1, 1, 8, "0"), hidden=4)
    with pytest.raises(SmartKVError, match="4 hidden units can become a multiple of that wide, not 6"):
        one_output_per_age(gates, (16,), 6)
