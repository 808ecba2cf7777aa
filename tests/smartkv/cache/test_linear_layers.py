"""Caches of hybrid models, in which layers with linear attention hold states beside the keys of the others."""

from copy import deepcopy
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.linear_layers import layers_of_model, linear_layers
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.models import key_sites
from smartkv.models.architecture import Architecture
from smartkv.models.wrappers import attention_blocks, attention_layer, linear_attention_modules
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.families import make
from tests.models import llama, token_ids
from tests.smartkv.cache.fixtures import recent, state

FORM = "qwen3_next"
EVERYTHING = HybridPolicy((LayerRule("all", "full"),))
MAKERS: dict[str, Any] = {
    "LifespanCache": lambda model: LifespanCache(model, None, recent(4, 1), chunk=5),
    "QuantizedCache": lambda model: QuantizedCache(model, "int8", residual=64),
    "AdaptiveCache": lambda model: AdaptiveCache(model, None, residual=64, chunk=5),
}
by_cache = pytest.mark.parametrize("name", MAKERS)


@once
def hybrid() -> PreTrainedModel:
    if not key_sites.HOLDS_STATES:
        pytest.skip("this transformers holds the states of linear attention elsewhere")
    return make(FORM)


@torch.no_grad()
def fed(cache: Any, ids: Tensor) -> Tensor:
    return torch.cat([hybrid()(part, past_key_values=cache).logits for part in ids.split([3, ids.shape[1] - 3], 1)], 1)


def test_only_layers_with_attention_are_counted() -> None:
    model = hybrid()
    assert [model.config.layer_types[n] for n in (0, 2)] == ["linear_attention"] * 2
    assert (
        Architecture.of(model.config).layers
        == len(attention_blocks(model))
        == len(linear_attention_modules(model))
        == 2
    )
    assert [attention_layer(block.self_attn) for block in attention_blocks(model)] == [0, 1]
    cache = LifespanCache(model, None, HybridPolicy((LayerRule("0", "window", 3), LayerRule("1", "full")), sinks=0))
    with cache:
        fed(cache, token_ids(20)[None])
    seen = sum(min(query + 1, 3) for query in range(20)) / 210
    assert cache.footprint_by_head.tolist() == [[pytest.approx(seen)] * 2, [1.0] * 2]
    assert cache.footprint == pytest.approx((seen + 1) / 2)


def test_a_model_without_linear_attention_has_its_own_layers_alone() -> None:
    layers = [object(), object()]
    assert layers_of_model(llama().config, layers) == layers
    assert list(linear_layers(layers_of_model(hybrid().config, QuantizedCache(llama(), "int8").storage))) == [0, 2]


@pytest.mark.parametrize(
    ("choose", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    ],
)
@by_cache
def test_rows_that_are_chosen_go_on_as_they_would_have(name: str, choose: Any, rows: list[int]) -> None:
    ids, more = token_ids(36).view(3, 12), token_ids(18, 1).view(3, 6)
    cache, whole = (MAKERS[name](hybrid()) for _ in range(2))
    for each in (cache, whole):
        fed(each, ids)
    with torch.inference_mode():  # whose tensors must not be changed outside it
        choose(cache)
    with torch.no_grad():
        got, want = (hybrid()(part, past_key_values=c).logits for part, c in ((more[rows], cache), (more, whole)))
    torch.testing.assert_close(got, want[rows], atol=1e-5, rtol=0)


@by_cache
def test_a_cache_that_forgot_all_takes_another_number_of_rows(name: str) -> None:
    cache, fresh, ids = MAKERS[name](hybrid()), MAKERS[name](hybrid()), token_ids(12, 2)[None]
    fed(cache, token_ids(36).view(3, 12))
    cache.reset()
    assert torch.equal(fed(cache, ids), fed(fresh, ids))


@by_cache
def test_what_has_been_read_cannot_be_taken_back(name: str) -> None:
    cache = MAKERS[name](hybrid())
    fed(cache, token_ids(12)[None])
    with pytest.raises(SmartKVError, match="cannot be cropped"):
        cache.crop(-2)
    assert cache.get_seq_length() == 12


def test_beam_search_writes_what_it_writes_with_the_models_own_cache() -> None:
    model, ids = hybrid(), token_ids(16).view(2, 8)
    call = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with LifespanCache(model, None, EVERYTHING) as cache:
        got = model.generate(ids, past_key_values=cache, **call)
    assert torch.equal(got, model.generate(ids, **call))


def test_a_copy_goes_on_alone() -> None:
    cache, ids = LifespanCache(hybrid(), None, EVERYTHING), token_ids(12)[None]
    fed(cache, ids)
    twin = deepcopy(cache)
    other = fed(twin, token_ids(8, 3)[None])
    assert not torch.equal(fed(cache, token_ids(8, 4)[None]), other) and cache.get_seq_length() == 20
    straight = DynamicCache(config=hybrid().config)
    fed(straight, ids)
    torch.testing.assert_close(other, fed(straight, token_ids(8, 3)[None]), atol=1e-5, rtol=0)


def test_the_model_is_as_it_was() -> None:
    model = hybrid()
    before = state(model), [len(module._forward_pre_hooks) for module in model.modules()]
    with LifespanCache(model, None, EVERYTHING) as cache:
        fed(cache, token_ids(12)[None])
    assert (state(model), [len(module._forward_pre_hooks) for module in model.modules()]) == before


def test_an_interruption_before_any_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the first layer has gone on."""
    cache = LifespanCache(hybrid(), None, EVERYTHING)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "attend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fed(cache, token_ids(12)[None])
    with pytest.raises(SmartKVError, match="was interrupted"):
        fed(cache, token_ids(12)[None])
    cache.reset()
    fed(cache, token_ids(12)[None])


def test_a_file_without_a_state_is_refused(tmp_path: Path) -> None:
    cache, path = LifespanCache(hybrid(), None, EVERYTHING), tmp_path / "prompt.safetensors"
    fed(cache, token_ids(12)[None])
    save_cache(cache, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith("states.2.")}
    assert len(tensors) < len(load_file(path))
    save_file(tensors, path, metadata)
    with pytest.raises(SmartKVError, match="the states of layer 2 are missing"):
        load_cache(path, hybrid())


def test_a_transformers_whose_caches_hold_no_states_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sites, "HOLDS_STATES", False)
    with pytest.raises(SmartKVError, match=r"'qwen3_next' is not supported in transformers 5.* use 5\.17 or newer"):
        LifespanCache(hybrid(), None, EVERYTHING)
