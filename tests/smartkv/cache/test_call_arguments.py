"""Options of a call that a cache would not honour are refused before anything is computed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.attached import AttachedCache
from smartkv.cache.call_arguments import refuse_batches
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import MODELS, recent

IDS = token_ids(8).clamp(min=1)[None]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CACHES: list[Callable[[Any], AttachedCache]] = [lambda model: LifespanCache(model, None, recent(4)), AdaptiveCache]


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize(
    ("option", "message"),
    [({"use_cache": False}, "use_cache=False"), ({"output_attentions": True}, "output_attentions=True")],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_option_that_would_be_ignored_is_refused(
    make: Callable[[Any], AttachedCache], option: dict[str, Any], message: str, family: str
) -> None:
    model = MODELS[family]
    cache = make(model)
    calls = [
        lambda: model(IDS, past_key_values=cache, **option),
        lambda: model.generate(IDS, past_key_values=cache, return_dict_in_generate=True, **option, **GREEDY),
    ]
    for call in calls:
        with pytest.raises(SmartKVError, match=message):
            call()
        assert cache.get_seq_length() == 0


def test_options_of_the_config_count_too() -> None:
    model = copy.deepcopy(MODELS["llama"])
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(SmartKVError, match="output_attentions"):
        model(IDS, past_key_values=LifespanCache(model, None, recent(4)))


def test_continuous_batching_is_refused_with_the_cache() -> None:
    model = MODELS["llama"]
    cache = LifespanCache(model, None, recent(4))
    with pytest.raises(SmartKVError, match="generate_batch has a paged cache of its own"):
        model.generate_batch([[1, 2, 3]], past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_of_attention_in_training_mode_is_refused(family: str) -> None:
    name = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    model = FAMILIES[family](**{name: 0.5})
    cache = LifespanCache(model, None, recent(4))
    model(IDS, past_key_values=cache)
    model.train()
    with pytest.raises(SmartKVError, match=r"attention dropout 0\.5: call model\.eval\(\)"):
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("name", ["softcap", "s_aux", "cu_seq_lens_q", "mystery"])
def test_attention_of_another_kind_is_refused_and_not_swallowed(name: str) -> None:
    model = llama()
    with pytest.raises(SmartKVError, match=f"attention with {name} is not supported"):
        model(IDS, past_key_values=LifespanCache(model, None, recent(4)), **{name: torch.ones(4)})


@pytest.mark.parametrize(
    "guess", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": llama(1)}], ids=["lookup", "model"]
)
def test_assisted_generation_goes_back_in_an_adaptive_cache(guess: dict[str, Any]) -> None:
    model = MODELS["llama"]
    ids = IDS.repeat(1, 2)
    options = GREEDY | {"eos_token_id": 63}  # transformers 5.2 looks for one in a guess
    want = model.generate(ids, past_key_values=AdaptiveCache(model), **options)
    assert torch.equal(model.generate(ids, past_key_values=AdaptiveCache(model), **guess, **options), want)


def test_whether_a_cache_can_go_back_is_asked_without_going_back() -> None:
    model = MODELS["llama"]
    cache = AdaptiveCache(model)
    model(IDS, past_key_values=cache)
    cache.check_can_go_back(3)
    assert cache.get_seq_length() == IDS.shape[1]


def test_batches_without_our_cache_are_generated_as_they_were_asked_for() -> None:
    found = refuse_batches(lambda *args, **kwargs: (args, kwargs), AttachedCache, [1, 2], 3, max_new_tokens=4)
    assert found == (([1, 2], 3), {"max_new_tokens": 4})
