"""Models whose rotary embedding is scaled to longer texts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from tests.models import llama, qwen2, token_ids
from tests.smartkv.cache.fixtures import recent

POSITIONS = 32  # of the model before scaling
ROPE: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": POSITIONS},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": POSITIONS,
    },
}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model_with(rope: str, family: Any = llama) -> PreTrainedModel:
    return family(max_position_embeddings=POSITIONS, rope_parameters={"rope_theta": 10000.0, **ROPE[rope]})  # type: ignore[no-any-return]


def logits(model: PreTrainedModel, ids: Tensor, cache: Any, cuts: tuple[int, ...] = ()) -> Tensor:
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.tensor_split(cuts, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("tokens", [POSITIONS, POSITIONS + 1, 3 * POSITIONS, 4 * POSITIONS])
def test_logits_are_the_full_caches_and_do_not_depend_on_the_chunk(rope: str, tokens: int) -> None:
    ids = token_ids(tokens)[None]
    model = model_with(rope)
    want = logits(model, ids, DynamicCache(config=model.config))
    for chunk in (7, POSITIONS, 1024):
        model = model_with(rope)  # a dynamic embedding remembers the longest call
        cache = LifespanCache(model, None, recent(1024), chunk=chunk)
        torch.testing.assert_close(logits(model, ids, cache), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope", ["yarn", "linear", "dynamic"])
@pytest.mark.parametrize("family", [llama, qwen2])
def test_an_answer_reaches_beyond_the_unscaled_positions_as_with_a_full_cache(rope: str, family: Any) -> None:
    ids = token_ids(POSITIONS - 4).clamp(min=1)[None]
    want = model_with(rope, family).generate(ids, max_new_tokens=12, **GREEDY)
    model = model_with(rope, family)
    cache = LifespanCache(model, None, recent(1024), chunk=5)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=12, **GREEDY), want)


@pytest.mark.parametrize("rope", ROPE)
def test_beyond_the_scaled_positions_is_refused_with_their_number(rope: str) -> None:
    model = model_with(rope)
    with pytest.raises(SmartKVError, match=f"the model has {4 * POSITIONS} positions"):
        model(token_ids(4 * POSITIONS + 1)[None], past_key_values=LifespanCache(model, None, recent(4)))


def test_a_switch_of_longrope_after_the_first_tokens_is_refused() -> None:
    """The cached keys would be rotated the short way, and new queries the long way."""
    model, ids = model_with("longrope"), token_ids(POSITIONS + 8).clamp(min=1)[None]
    cache = LifespanCache(model, None, recent(4))
    with pytest.raises(SmartKVError, match=f"longrope rotates all keys in another way beyond {POSITIONS} tokens"):
        model.generate(ids[:, :20], past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert cache.get_seq_length() == 0
    logits(model, ids[:, :20], cache)
    with pytest.raises(SmartKVError, match="give a longer prompt at once"):
        logits(model, ids[:, 20:], cache)
    assert cache.get_seq_length() == 20
    logits(model, ids[:, 20:POSITIONS], cache)


def test_a_longrope_answer_to_a_long_prompt_is_the_full_caches() -> None:
    ids = token_ids(POSITIONS + 8).clamp(min=1)[None]
    want = model_with("longrope").generate(ids, max_new_tokens=8, **GREEDY)
    model = model_with("longrope")
    cache = LifespanCache(model, None, recent(1024), chunk=5)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=8, **GREEDY), want)


def test_only_a_call_beyond_the_switch_goes_through_the_model_in_one_piece() -> None:
    model = model_with("longrope")
    cache = LifespanCache(model, None, recent(4))
    assert cache.chunk_of_call(POSITIONS) == 1024 and cache.chunk_of_call(POSITIONS + 1) == POSITIONS + 1
