"""Keys that a model would not compute are told from its own."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from smartkv.cache.first_tokens import differing_layer
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import MODELS, recent


def scaled(layer: int, name: str) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        getattr(model.model.layers[layer].self_attn, name).weight.data.mul_(1.5)
        return model

    return change


def with_adapter(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (scaled(0, "k_proj"), 0),
        (scaled(1, "k_proj"), 1),
        (scaled(1, "v_proj"), 1),
        (scaled(0, "o_proj"), 1),
        (with_adapter, 0),
    ],
)
def test_a_prompt_of_a_changed_model_is_refused_with_its_layer(
    change: Callable[[Any], Any], layer: int, tmp_path: Path
) -> None:
    cache = LifespanCache(llama(), None, recent(4, 4))
    cache.model(token_ids(20)[None], past_key_values=cache)
    save_cache(cache, tmp_path / "prompt.safetensors")
    with pytest.raises(SmartKVError, match=f"computed by other weights .* from layer {layer} on"):
        load_cache(tmp_path / "prompt.safetensors", change(llama()))
    load_cache(tmp_path / "prompt.safetensors", llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_keys_are_never_refused(family: str, dtype: torch.dtype) -> None:
    model, ids = copy.deepcopy(MODELS[family]).to(dtype), token_ids(40).view(2, 20)
    cache = LifespanCache(model, None, recent(4, 2), chunk=7)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=torch.arange(20)[None] + 3, past_key_values=cache)
    cache.settle()
    assert differing_layer(cache) is None


def test_embeddings_and_packed_keys_are_not_compared() -> None:
    model, ids = llama(), token_ids(20)[None]
    packed, embedded = LifespanCache(model, None, recent(4, 4), bits=4), LifespanCache(model, None, recent(4, 4))
    with torch.no_grad():
        model(ids, past_key_values=packed)
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=embedded)
    scaled(0, "k_proj")(model)
    assert differing_layer(packed) is None and differing_layer(embedded) is None
