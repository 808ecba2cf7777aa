"""A LifespanCache in place of any other cache, without a `with`."""

import gc

import pytest

from smartkv.cache import LifespanCache
from tests.models import token_ids
from tests.smartkv.test_cache import FAMILIES, MODELS, recent, state


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral_sliding"])
def test_generate_takes_the_cache_without_a_with_and_the_model_is_free_when_it_dies(family: str) -> None:
    model, ids = MODELS[family], token_ids(12)[None]
    before = state(model)
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, **call)
    got = model.generate(ids, past_key_values=LifespanCache(model, None, recent(64), chunk=5), **call)
    assert got.tolist() == want.tolist()
    gc.collect()
    assert state(model) == before
