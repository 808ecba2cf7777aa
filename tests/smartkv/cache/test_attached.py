"""Attaching a LifespanCache to a model: exceptions, copies, grad modes, and several caches."""

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, fed, gated_logits, random_gates, recent, state, tensors_of

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
GRAD_MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


def connection_error(model: PreTrainedModel, module: nn.Module, cache: LifespanCache, call: int) -> None:
    """Generate until `module` is called for the `call`-th time, which raises."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == call:
            raise ZeroDivisionError

    handle = module.register_forward_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            model.generate(token_ids(12)[None], past_key_values=cache, **GREEDY)
    finally:
        handle.remove()


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_between_two_calls_the_model_attends_as_it_did(family: str, implementation: str) -> None:
    model, ids = copy.deepcopy(MODELS[family]), token_ids(12)[None]
    model.set_attn_implementation(implementation)
    before, want = state(model), model(ids).logits
    with LifespanCache(model, None, recent(1)) as cache:
        model.generate(ids, past_key_values=cache, **GREEDY)
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(ids).logits, want)
    assert state(model) == before


@pytest.mark.parametrize("call", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_the_middle_of_generate_leaves_nothing_behind(family: str, call: int) -> None:
    model, ids = MODELS[family], token_ids(12)[None]
    before, want, cache = state(model), model(ids).logits, LifespanCache(model, None, recent(3))
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    connection_error(model, layers[0], cache, call)
    assert model.config._attn_implementation == before[0]
    assert torch.equal(model(ids).logits, want)
    del cache
    gc.collect()
    assert state(model) == before


def test_two_caches_in_turn_are_as_two_alone() -> None:
    model, gates, ids = MODELS["llama"], random_gates(MODELS["llama"]), token_ids(60).view(2, 1, 30)
    before, caches = state(model), [LifespanCache(model, gates, GATED) for _ in ids]
    parts: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, 9, *range(10, 31)]):
            for part, own, cache in zip(parts, ids, caches, strict=True):
                part.append(model(own[:, start:stop], past_key_values=cache).logits)
    for part, own in zip(parts, ids, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=1), gated_logits(model, gates, own), atol=1e-4, rtol=0)
    caches.pop().detach()
    assert state(model) != before
    del cache
    caches.clear()
    gc.collect()
    assert state(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_copied_meanwhile_is_a_model_of_its_own(family: str) -> None:
    model, ids = MODELS[family], token_ids(16)[None]
    with LifespanCache(model, None, recent(3)), torch.no_grad():
        twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.2)
    fresh = FAMILIES[family]()
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(twin(ids).logits, fresh(ids).logits)
    got = fed(twin, LifespanCache(twin, None, recent(3)), ids, torch.ones_like(ids).bool(), [9])
    assert torch.equal(got, fed(fresh, LifespanCache(fresh, None, recent(3)), ids, torch.ones_like(ids).bool(), [9]))


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_pass_that_was_broken_off_between_layers_is_told_and_reset_mends_it() -> None:
    model, ids, real = MODELS["llama"], token_ids(12)[None], torch.ones(1, 12, dtype=torch.bool)
    cache = LifespanCache(model, None, recent(3))
    connection_error(model, model.model.layers[0], cache, 5)
    with pytest.raises(SmartKVError, match=r"interrupted.*cache\.reset"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(
        fed(model, cache, ids, real, []), fed(model, LifespanCache(model, None, recent(3)), ids, real, [])
    )


@pytest.mark.parametrize("attached", [False, True])
def test_another_model_is_refused_before_it_computes_without_the_keys(attached: bool) -> None:
    model, other, ids = MODELS["llama"], llama(1), token_ids(12)[None]
    cache = LifespanCache(model, None, recent(4))
    keep = LifespanCache(other, None, recent(4)) if attached else None
    with pytest.raises(SmartKVError, match="made for another model"):
        other(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0 and (keep is None or keep.get_seq_length() == 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("modes", list(itertools.permutations(GRAD_MODES, 2)))
def test_what_one_grad_mode_stores_another_goes_on_with(modes: tuple[Any, Any], family: str) -> None:
    model, gates, ids = MODELS[family], random_gates(MODELS[family]), token_ids(40, 2)[None]
    want, cache = gated_logits(model, gates, ids), LifespanCache(model, gates, GATED)
    for mode, start in ((modes[0], 0), (modes[1], 20)):
        with mode():
            first = model(ids[:, start : start + 10], past_key_values=cache).logits
            rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start + 10, start + 20)]
        got = torch.cat([first, *rest], dim=1)
        torch.testing.assert_close(got.detach().clone(), want[:, start : start + 20], atol=1e-4, rtol=0)


def test_no_graph_is_kept_alive() -> None:
    model, ids = MODELS["llama"], token_ids(12)[None]
    cache = LifespanCache(model, None, recent(4))
    output = model(ids, past_key_values=cache).logits
    model(ids[:, :1], past_key_values=cache)
    assert output.requires_grad  # of the last layer's own making
    assert not [tensor for tensor in tensors_of(cache.storage) if tensor.requires_grad]


def test_a_copy_goes_on_by_itself_with_the_same_model() -> None:
    """How a prompt that many questions share is read once."""
    model, gates, prompt = MODELS["llama"], random_gates(MODELS["llama"]), token_ids(30, 6).clamp(min=1)[None]
    cache, found = LifespanCache(model, gates, GATED), {}
    before = state(model)
    model.generate(prompt[:, :20], past_key_values=cache, **GREEDY | {"max_new_tokens": 1})
    for seed in (1, 2):
        question, twin = torch.cat([prompt, token_ids(5, seed).clamp(min=1)[None]], dim=1), copy.deepcopy(cache)
        assert twin.model is model and twin.gates is gates and twin.storage_bytes == cache.storage_bytes
        found[seed] = model.generate(question, past_key_values=twin, **GREEDY).tolist()
        fresh = LifespanCache(model, gates, GATED)
        assert found[seed] == model.generate(question, past_key_values=fresh, **GREEDY).tolist()
    assert found[1] != found[2] and cache.get_seq_length() == 20
    del twin, fresh
    gc.collect()
    assert state(model) == before


def test_a_copy_of_a_detached_cache_is_detached_and_can_be_attached() -> None:
    model = MODELS["llama"]
    before, cache = state(model), LifespanCache(model, None, recent(4))
    cache.detach()
    twin = copy.deepcopy(cache)
    twin.detach()
    assert not twin.attached and state(model) == before
    with twin:
        assert twin.attached and not cache.attached and state(model) != before
    assert state(model) == before


def test_attaching_and_detaching_twice_is_as_once() -> None:
    model = MODELS["llama"]
    before, cache = state(model), LifespanCache(model, None, recent(4))
    cache.attach()
    cache.detach()
    cache.detach()
    assert state(model) == before


def test_detaching_a_copy_leaves_the_cache_attached() -> None:
    model, ids = MODELS["llama"], token_ids(12)[None]
    cache = LifespanCache(model, None, recent(4))
    copy.deepcopy(cache).detach()
    model(ids, past_key_values=cache)
    assert cache.attached and cache.get_seq_length() == 12
