"""Mistakes are refused in one line that says what was expected, before a layer has computed anything."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, random_gates, recent

FIXED = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
POSITIONS = 256  # of the tiny models


def first_layer(model: PreTrainedModel) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]


@contextmanager
def refused(model: PreTrainedModel, message: str) -> Iterator[None]:
    """Inside, a SmartKVError comes before the first layer is through."""
    through: list[nn.Module] = []
    handle = first_layer(model).register_forward_hook(lambda layer, *_: through.append(layer))
    try:
        with pytest.raises(SmartKVError, match=message), torch.no_grad():
            yield
    finally:
        handle.remove()
    assert not through


def filled(model: PreTrainedModel, tokens: int = 8) -> LifespanCache:
    """A cache that has read one row."""
    cache = LifespanCache(model, None, recent(4))
    with torch.no_grad():
        model(token_ids(tokens)[None], past_key_values=cache)
    return cache


# -- the constructor --------------------------------------------------------------------------------------------------


def test_gates_of_another_architecture_are_refused_by_name() -> None:
    gates = GateBank(Fingerprint.of(MODELS["gpt2"]))
    with pytest.raises(SmartKVError, match=r"gpt2.*llama"):
        LifespanCache(MODELS["llama"], gates, GATED)


def test_gates_on_another_device_are_refused_with_what_to_call() -> None:
    gates = random_gates(MODELS["llama"]).to("meta")
    with pytest.raises(SmartKVError, match=r"the gates are on meta, the model is on cpu: call gates\.to\('cpu'\)"):
        LifespanCache(MODELS["llama"], gates, GATED)


def test_a_policy_that_asks_gates_is_refused_without_them() -> None:
    with pytest.raises(SmartKVError, match="gates layers 0-1, but no gates were given"):
        LifespanCache(MODELS["llama"], None, GATED)


def test_a_policy_with_something_open_is_refused() -> None:
    with pytest.raises(SmartKVError, match="leaves its window open"):
        LifespanCache(MODELS["llama"], None, HybridPolicy((LayerRule("all", "window"),)))


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True, "8", None])
def test_a_chunk_that_is_no_number_of_tokens_is_refused(chunk: Any) -> None:
    with pytest.raises(SmartKVError, match=r"chunk must be a number of tokens, at least 1, got "):
        LifespanCache(MODELS["llama"], None, recent(4), chunk=chunk)


@pytest.mark.parametrize("window", [0, -3, True, 2.0])
def test_a_window_in_which_a_token_does_not_see_itself_is_refused(window: Any) -> None:
    with pytest.raises(SmartKVError, match=r"window of layers all must be (at least 1|a number)"):
        recent(window)


@pytest.mark.parametrize("sinks", [-1, True, 1.5])
def test_sinks_that_are_no_number_of_tokens_are_refused(sinks: Any) -> None:
    with pytest.raises(SmartKVError, match="sinks must be a number of tokens, 0 or more"):
        recent(4, sinks)


@pytest.mark.parametrize("footprint", [-0.1, 1.01, math.nan, math.inf])
def test_a_footprint_that_is_no_share_is_refused(footprint: float) -> None:
    with pytest.raises(SmartKVError, match="above 0 and at most 1"):
        solve(HybridPolicy((LayerRule("all", "window"),)), footprint, Calibration.without_gates(2, 64))


# -- a model that changed ---------------------------------------------------------------------------------------------


def test_another_dtype_is_refused_with_both() -> None:
    model = deepcopy(MODELS["llama"])
    cache = filled(model)
    model.bfloat16()
    with refused(model, r"torch\.float32.*computes in torch\.bfloat16"):
        model(token_ids(1)[None], past_key_values=cache)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("tokens", [1, 4])
def test_another_batch_is_refused_with_both(tokens: int) -> None:
    model = MODELS["llama"]
    cache = filled(model)
    with refused(model, "holds 1 rows, the model was given 2 rows"):
        model(token_ids(2 * tokens).view(2, tokens), past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_a_detached_cache_is_refused() -> None:
    model = MODELS["llama"]
    cache = LifespanCache(model, None, recent(4))
    cache.detach()
    with refused(model, r"cache\.attach"):
        model(token_ids(4)[None], past_key_values=cache)


# -- more tokens than positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_past_the_models_positions_is_refused_with_their_number(family: str) -> None:
    model, ids = MODELS[family], token_ids(POSITIONS + 1)[None]
    for call in (model, lambda *args, **more: model.generate(*args, max_new_tokens=1, **FIXED, **more)):
        with refused(model, "25[78] tokens, the model has 256 positions"):
            call(ids, past_key_values=LifespanCache(model, None, recent(4)))


@pytest.mark.parametrize("length", [{"max_new_tokens": 57}, {"max_length": 257}])
@pytest.mark.parametrize("prompt", ["ids", "embeddings"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_would_pass_them_is_refused_before_it_begins(
    family: str, prompt: str, length: dict[str, int]
) -> None:
    model, ids = MODELS[family], token_ids(200)[None]
    cache, given = LifespanCache(model, None, recent(4)), {"input_ids": ids}
    if prompt == "embeddings":
        given = {"inputs_embeds": model.get_input_embeddings()(ids)}
    with refused(model, "come to 257 tokens, the model has 256 positions .*lower max_new_tokens"):
        model.generate(**given, past_key_values=cache, **length, **FIXED)


def test_an_answer_that_just_fits_is_given() -> None:
    model = MODELS["llama"]
    cache = LifespanCache(model, None, recent(4))
    assert model.generate(token_ids(200)[None], past_key_values=cache, max_new_tokens=56, **FIXED).shape[1] == POSITIONS


def test_what_the_cache_holds_counts_too() -> None:
    model = MODELS["llama"]
    cache = filled(model, POSITIONS - 2)
    with refused(model, r"257 tokens.*\(254 are in the cache\)"):
        model(token_ids(3)[None], past_key_values=cache)


# -- a call -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), r"4-D \(1, 1, 4, 4\)"),
        (torch.ones(4), r"1-D \(4,\)"),
        (torch.ones(1, 3), r"2-D \(1, 3\)"),
        (torch.ones(2, 4), r"2-D \(2, 4\)"),
        ({"full_attention": torch.ones(1, 1, 4, 4)}, "dict"),
    ],
    ids=["4-D", "1-D", "short", "other rows", "by kind of layer"],
)
@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_a_mask_that_does_not_mark_padding_is_refused_with_its_shape(family: str, mask: Any, what: str) -> None:
    model = MODELS[family]
    with refused(model, rf"mask \[batch, tokens\] that marks padding, got {what} for 1 × 4 tokens"):
        model(token_ids(4)[None], past_key_values=LifespanCache(model, None, recent(4)), attention_mask=mask)


def test_ids_without_a_batch_are_refused_with_their_shape() -> None:
    model = MODELS["llama"]
    with refused(model, r"input_ids \[batch, tokens\], got \(4,\)"):
        model(token_ids(4), past_key_values=LifespanCache(model, None, recent(4)))


def test_a_call_without_tokens_is_refused() -> None:
    model = MODELS["llama"]
    with refused(model, "neither input_ids nor inputs_embeds"):
        model(past_key_values=LifespanCache(model, None, recent(4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_wants_the_cache_by_its_name(family: str) -> None:
    model = MODELS[family]
    cache = LifespanCache(model, None, recent(4))
    places: list[tuple[Any, ...]] = [(cache,), (None, None, cache)]
    for rest in places:
        with refused(model, r"by name: model\(ids, past_key_values=cache\)"):
            model.base_model(token_ids(4)[None], *rest)


def test_other_arguments_of_a_decoder_want_their_names_too() -> None:
    model, mask = MODELS["llama"], torch.ones(1, 4)
    with refused(model, "only input_ids may be given by position"):
        model.base_model(token_ids(4)[None], mask, past_key_values=LifespanCache(model, None, recent(4)))


# -- going back -------------------------------------------------------------------------------------------------------


def test_crop_says_how_far_it_cannot_go_back() -> None:
    cache = filled(MODELS["llama"])
    with pytest.raises(SmartKVError, match=r"5 latest tokens.*the last 4 tokens may be freed.*rollback=5"):
        cache.crop(-5)
    with pytest.raises(SmartKVError, match="crop takes a number of tokens"):
        cache.crop(1.5)  # type: ignore[arg-type]
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize(
    "guess", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": llama(1)}], ids=["lookup", "assistant"]
)
def test_assisted_generation_which_must_go_back_too_far_is_refused_before_it_begins(guess: dict[str, Any]) -> None:
    model = MODELS["llama"]
    with refused(model, "cannot be dropped .assisted generation and prompt lookup"):
        cache = LifespanCache(model, None, recent(4), rollback=1)
        model.generate(token_ids(8)[None], past_key_values=cache, max_new_tokens=4, **guess, **FIXED)
