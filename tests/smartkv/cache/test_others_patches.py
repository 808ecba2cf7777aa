"""What somebody else puts on a model, before a cache lives or meanwhile, stays and goes on working."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.errors import SmartKVError
from tests.models import token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, Recording, random_gates, recent, state

IDS = token_ids(12).clamp(min=1)[None]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Collections look at what these tests make alone, and not at all that was imported: they are many."""
    gc.freeze()
    yield
    gc.unfreeze()
    gc.freeze()


def fresh() -> Any:
    """A copy of a model to which no cache is attached."""
    gc.collect()
    return copy.deepcopy(MODELS["llama"])


class Calls(ModelHook):
    """An accelerate hook that counts the calls of a module."""

    def __init__(self) -> None:
        self.count = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return args, kwargs


class Patch:
    """A wrapper around a method of an object, set on the object itself."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.count = owner, name, 0
        self.inner: Callable[..., Any] = getattr(owner, name)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.inner(*args, **kwargs)

    @property
    def stands(self) -> bool:
        return self.owner.__dict__.get(self.name) is self


def cached(model: Any) -> Tensor:
    cache = LifespanCache(model, None, recent(3), chunk=5)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in IDS.split(7, dim=1)]
    return torch.cat(parts, dim=1)


def generated(model: Any) -> list[list[int]]:
    return model.generate(IDS, past_key_values=LifespanCache(model, None, recent(3)), **GREEDY).tolist()  # type: ignore[no-any-return]


PLACES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda model: model.model, "forward"),
    (lambda model: model, "forward"),
    (lambda model: model.model.layers[1], "forward"),
    (lambda model: model.model.layers[1].self_attn, "forward"),
    (lambda model: model.model.layers[1].self_attn.k_proj, "forward"),
    (lambda model: model, "_prepare_cache_for_generation"),
    (lambda model: model, "generate"),
    (lambda model: model, "prepare_inputs_for_generation"),
]


@pytest.mark.parametrize("place", range(len(PLACES)), ids=[f"{name}{i}" for i, (_, name) in enumerate(PLACES)])
@pytest.mark.parametrize("when", ["before", "while", "while, and taken off after", "between two"])
def test_a_patch_stays_and_works(place: int, when: str) -> None:
    model = fresh()
    want = model(IDS).logits, cached(model), generated(model)
    gc.collect()
    first = None if when == "before" else LifespanCache(model, None, recent(3))
    owner, name = PLACES[place]
    patch = Patch(owner(model), name)
    second = AdaptiveCache(model) if when == "between two" else None
    for _ in range(2):
        assert torch.equal(cached(model), want[1]) and generated(model) == want[2]
    del first, second
    gc.collect()
    assert patch.stands
    count = patch.count
    assert torch.equal(model(IDS).logits, want[0]) and torch.equal(cached(model), want[1])
    assert generated(model) == want[2] and patch.count > count
    gc.collect()
    assert patch.stands
    if "taken off" in when:
        patch.owner.__dict__[name] = patch.inner
        assert torch.equal(model(IDS).logits, want[0]) and torch.equal(cached(model), want[1])
        assert generated(model) == want[2]


@pytest.mark.parametrize("when", ["before", "while"])
def test_an_accelerate_hook_on_the_decoder_stays_and_can_be_removed(when: str) -> None:
    model = fresh()
    want, want_cached, clean = model(IDS).logits, cached(model), state(model)
    gc.collect()
    cache = None if when == "before" else LifespanCache(model, None, recent(3))
    hook = Calls()
    add_hook_to_module(model.model, hook)
    assert torch.equal(cached(model), want_cached)
    del cache
    gc.collect()
    count = hook.count
    assert torch.equal(model(IDS).logits, want) and hook.count == count + 1
    remove_hook_from_module(model.model)
    assert torch.equal(model(IDS).logits, want) and torch.equal(cached(model), want_cached)
    if when == "before":
        gc.collect()
        assert state(model)[0] == clean[0] and state(model)[3] == clean[3]


def test_a_config_that_is_replaced_while_a_cache_lives_stays() -> None:
    model = fresh()
    cache = LifespanCache(model, None, recent(3))
    mine = copy.deepcopy(model.config)
    model.model.layers[0].self_attn.config = mine
    del cache
    gc.collect()
    assert model.model.layers[0].self_attn.config is mine
    assert model.model.layers[1].self_attn.config is model.config


def test_an_adapter_that_is_added_while_a_cache_lives_is_read_by_the_gates() -> None:
    decided = []
    for cache_first in (False, True):
        model = fresh()
        keep = LifespanCache(model, None, recent(3)) if cache_first else None
        torch.manual_seed(0)
        get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False)).eval()
        cache = Recording(model, random_gates(MODELS["llama"]), GATED)
        model(IDS, past_key_values=cache)
        decided.append(torch.cat([ttl for layer in cache.decided.values() for ttl in layer]))
        del keep
    plain = Recording(MODELS["llama"], random_gates(MODELS["llama"]), GATED)
    MODELS["llama"](IDS, past_key_values=plain)
    assert torch.equal(*decided)
    assert not torch.equal(decided[0], torch.cat([ttl for layer in plain.decided.values() for ttl in layer]))


LIVE: dict[str, Callable[[Any], Any]] = {
    "lifespan": lambda model: LifespanCache(model, policy="full"),
    "adaptive": AdaptiveCache,
    "quantized": lambda model: QuantizedCache(model, "fp16"),
}


@pytest.mark.parametrize("part", ["layer", "attention"])
@pytest.mark.parametrize("name", LIVE)
def test_a_layer_that_is_replaced_while_caches_live_attends_through_them(name: str, part: str) -> None:
    model = fresh()
    cache, layer = LIVE[name](model), model.model.layers[0]
    if part == "layer":
        model.model.layers[0] = copy.deepcopy(layer)
    else:
        layer.self_attn = copy.deepcopy(layer.self_attn)
    with torch.no_grad():
        for each in (cache, LIVE[name](model)):
            got = [model(ids, past_key_values=each).logits for ids in IDS.split(7, dim=1)]
            assert torch.allclose(torch.cat(got, dim=1), model(IDS).logits, atol=0.05)


@pytest.mark.parametrize("name", ["lifespan", "adaptive"])
def test_attention_that_is_hidden_in_another_module_is_refused(name: str) -> None:
    model = fresh()
    get_peft_model(model, LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["self_attn"]))
    with pytest.raises(SmartKVError, match=r"layer 0 is in a .*modules_to_save"):
        LIVE[name](model)
    assert not hasattr(model.model, "_smartkv_session")


def test_a_subclass_of_the_familys_attention_is_taken() -> None:
    model = fresh()
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("Mine", (type(attention),), {"__module__": __name__})
    with torch.no_grad():
        got = model(IDS, past_key_values=LifespanCache(model, policy="full")).logits
        torch.testing.assert_close(got, model(IDS).logits, atol=1e-5, rtol=0)


def test_attention_that_does_not_reach_the_cache_is_never_silent() -> None:
    model = fresh()
    cache, attention = LifespanCache(model, policy="full"), model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(SmartKVError, match="attention of layers 1 did not go through the LifespanCache"):
        model(IDS, past_key_values=cache)
    with pytest.raises(SmartKVError, match="interrupted"):
        model(IDS, past_key_values=cache)


def test_pickling_a_patched_model_or_a_cache_says_what_to_do_and_copying_works() -> None:
    model = fresh()
    want = model(IDS).logits
    with LifespanCache(model, policy="full") as cache:
        for thing, advice in ((model, "detach"), (cache, "save_cache")):
            with pytest.raises(SmartKVError, match=advice):
                pickle.dumps(thing)
        assert torch.equal(copy.deepcopy(model)(IDS).logits, want)
    assert pickle.loads(pickle.dumps(model))(IDS).logits.equal(want)
