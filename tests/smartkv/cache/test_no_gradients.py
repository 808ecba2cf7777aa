"""A backward pass through a cache is refused, and a model that needs none computes as ever."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.errors import SmartKVError
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import recent

CACHES: dict[str, Callable[[Any], Any]] = {
    "LifespanCache": lambda model: LifespanCache(model, None, recent(4)),
    "AdaptiveCache": AdaptiveCache,
    "QuantizedCache": lambda model: QuantizedCache(model, "int8"),
}
IDS = token_ids(8)[None]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("given", ["ids", "embeddings", "tuple"])
def test_a_loss_through_a_cache_cannot_be_differentiated(name: str, family: str, given: str) -> None:
    model = FAMILIES[family]()
    if given == "embeddings":
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings()(IDS).requires_grad_()
        loss = model(inputs_embeds=embeddings, labels=IDS, past_key_values=CACHES[name](model)).loss
    else:
        call = {"labels": IDS, "past_key_values": CACHES[name](model), "return_dict": given != "tuple"}
        loss = model(IDS, **call)[0]
    with pytest.raises(SmartKVError, match=f"no gradient flows through the {name}"):
        loss.backward()


@pytest.mark.parametrize("name", CACHES)
def test_a_frozen_model_gives_logits_without_a_graph(name: str) -> None:
    model = FAMILIES["llama"]().requires_grad_(False)
    assert not model(IDS, past_key_values=CACHES[name](model)).logits.requires_grad


def test_a_head_that_alone_is_trained_gets_its_gradient() -> None:
    model = FAMILIES["llama"](tie_word_embeddings=False).requires_grad_(False)
    model.lm_head.requires_grad_()
    model(IDS, labels=IDS, past_key_values=LifespanCache(model, None, recent(8))).loss.backward()
    cached = model.lm_head.weight.grad.clone()
    model.lm_head.weight.grad = None
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(cached, model.lm_head.weight.grad)


def test_no_layer_keeps_a_graph() -> None:
    model = FAMILIES["llama"]()
    cache = QuantizedCache(model, "kivi")
    model(IDS, past_key_values=cache)
    assert not cache.storage[0].keys.requires_grad
