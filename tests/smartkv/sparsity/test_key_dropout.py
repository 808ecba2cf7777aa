"""Dropping at random, by a window and by gates, beside plain counts and beside the cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.sparsity.key_dropout import GatedDropping, KeyDropout, share_seen, window_attention
from smartkv.sparsity.masked_attention import sparse_mask
from tests.models import FAMILIES, llama, qwen2_mixed, token_ids
from tests.smartkv.cache.fixtures import random_gates, state
from tests.smartkv.sparsity.fixtures import gates_for_ages


@given(st.integers(1, 12), st.integers(0, 19), st.lists(st.booleans(), min_size=20, max_size=20))
def test_the_share_that_is_seen_is_that_of_the_mask(recent: int, first_query: int, kept: list[bool]) -> None:
    stays = torch.tensor(kept).view(1, 1, 20)
    mask = sparse_mask(stays, recent)[0, 0, first_query:].double()
    want = mask.sum() / torch.ones(20, 20).tril()[first_query:].sum()
    assert float(share_seen(stays, recent, first_query)) == pytest.approx(float(want))


@given(st.floats(0, 1), st.integers(0, 2**31), st.sampled_from(["head", "layer", "model"]))
def test_a_draw_keeps_anchors_and_is_the_same_for_its_seed(ratio: float, seed: int, share: Any) -> None:
    dropout, always = KeyDropout(3, 2, 4, share), torch.rand(2, 30) < 0.2
    drawn = dropout.draw(always, ratio, [seed, seed + 1])
    assert drawn.shape == (3, 2, 2, 30) and drawn[always[None, :, None].expand_as(drawn)].all()
    assert torch.equal(drawn[:, 1:], dropout.draw(always[1:], ratio, [seed + 1]))
    if share != "head":
        assert torch.equal(drawn[:, :, 0], drawn[:, :, 1])
    if share == "model":
        assert torch.equal(drawn[0], drawn[2])


def test_a_draw_keeps_its_share_of_the_rest() -> None:
    always = torch.zeros(2, 4000, dtype=torch.bool)
    drawn = KeyDropout(4, 3, 1).draw(always, 0.3, range(len(always)))
    assert drawn.float().mean() == pytest.approx(0.3, abs=0.01)
    assert (drawn[0] != drawn[1]).any() and (drawn[:, :, 0] != drawn[:, :, 1]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_in_training_is_the_policy_window(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(40)[None]
    before = state(model)
    with torch.inference_mode():
        with window_attention(model, 6, 2, 1, 40):
            got = model(ids, use_cache=False).logits
        policy = HybridPolicy((LayerRule("all", "window", 6),), sinks=2)
        with LifespanCache(model, None, policy) as cache:
            want = model(ids, past_key_values=cache).logits
    assert torch.allclose(got, want, atol=1e-4) and state(model) == before


@pytest.mark.parametrize("make", [llama, qwen2_mixed])
def test_gates_in_training_are_the_gates_that_are_deployed(make: Callable[[], PreTrainedModel]) -> None:
    model, ids = make(), token_ids(40)[None]
    gates = gates_for_ages(model)
    with torch.inference_mode():
        with GatedDropping(gates, 0.5).dropped(model) as seen:
            got = model(ids, use_cache=False).logits
            share = float(seen(10))
        policy = HybridPolicy((LayerRule("all", "gated", 4),), sinks=2, price=0.0)
        with LifespanCache(model, gates, policy, first_query=10) as cache:
            want = model(ids, past_key_values=cache).logits
        assert 0.2 < cache.footprint < 0.95 and share == pytest.approx(cache.footprint, abs=1e-6)
    assert torch.allclose(got, want, atol=1e-4)


def test_soft_gates_learn_with_the_model() -> None:
    model, ids = llama(), token_ids(40)[None]
    gates = gates_for_ages(model).requires_grad_(True)
    with GatedDropping(gates, 0.5, temperature=0.5).dropped(model):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert gates.weight1.grad.abs().max() > 0
    assert model.base_model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


def test_soft_gates_learn_what_keeping_costs() -> None:
    model, ids = llama(), token_ids(40)[None]
    gates = gates_for_ages(model).requires_grad_(True)
    with GatedDropping(gates, 0.5, temperature=0.5).dropped(model) as seen:
        model(ids, use_cache=False)
        before = seen(10)
        before.backward()
    with torch.no_grad():
        gates.bias2 -= gates.bias2.grad.sign()
    with torch.no_grad(), GatedDropping(gates, 0.5, temperature=0.5).dropped(model) as seen:
        model(ids, use_cache=False)
        assert seen(10) < before - 0.05


def test_a_model_is_not_paid_for_keys_that_look_worth_keeping() -> None:
    """Through soft gates that do not learn, and pay no price, no gradient reaches the keys that they read."""
    model, ids = llama(), token_ids(40)[None]
    gates = gates_for_ages(model).requires_grad_(False)
    with GatedDropping(gates, 0.5, temperature=0.5).dropped(model) as seen:
        model(ids, use_cache=False)
        assert not seen(10).requires_grad


@pytest.mark.parametrize(
    "rules", [(("all", "gated", 6),), (("0", "window", 4), ("1", "gated", 4)), (("all", "gated", 4, 0.5),)]
)
def test_gates_of_another_policy_are_not_trained_under_as_if_they_were_deployed_so(rules: Any) -> None:
    gates = gates_for_ages(llama())
    policy = HybridPolicy(tuple(LayerRule(*rule) for rule in rules), sinks=2)
    gates.details["policy"] = policy.to_dict()
    with pytest.raises(SmartKVError, match="these gates go with a policy of other"):
        GatedDropping(gates, 0.5)


def test_gates_that_cannot_drop_are_refused() -> None:
    model = llama()
    for make in (lambda: GatedDropping(random_gates(model), 0.5), lambda: GatedDropping(gates_for_ages(model), 0.95)):
        with pytest.raises(SmartKVError):
            make()
