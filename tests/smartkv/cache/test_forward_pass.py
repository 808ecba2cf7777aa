"""A pass on a cache belongs to one thread: others that share the model compute as if they were alone."""

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, TextIteratorStreamer

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from tests.models import llama, tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, random_gates, recent, state

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROUNDS = 6


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads take turns every 10 µs and not every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def uses(model: Any, gates: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways of using a model, each a function from ids `[1, tokens]` to logits or ids."""

    def with_cache(make: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        def run(ids: Tensor) -> Tensor:
            cache = make()
            with torch.no_grad():
                first = model(ids[:, :12], past_key_values=cache).logits
                rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, ids.shape[1])]
            return torch.cat([first, *rest], dim=1)

        return run

    def plain(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    return {
        "plain": plain,
        "dynamic": with_cache(lambda: DynamicCache(config=model.config)),
        "recent": with_cache(lambda: LifespanCache(model, None, recent(3), chunk=5)),
        "gated": with_cache(lambda: LifespanCache(model, gates, GATED)),
        "adaptive": with_cache(lambda: AdaptiveCache(model)),
        "generate": lambda ids: model.generate(ids, past_key_values=LifespanCache(model, gates, GATED), **GREEDY),
        "plain generate": lambda ids: model.generate(ids, **GREEDY),
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_every_thread_computes_what_it_computes_alone(family: str) -> None:
    model = copy.deepcopy(MODELS[family])
    gates, before = random_gates(model), state(model)
    ways = uses(model, gates)
    work = [(name, token_ids(20, seed).clamp(min=1)[None]) for seed in range(ROUNDS) for name in ways]
    want = [ways[name](ids) for name, ids in work]
    gc.collect()
    assert state(model) == before
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda each: ways[each[0]](each[1]), work))
    for (name, _), got, alone in zip(work, found, want, strict=True):
        assert torch.allclose(got.float(), alone.float(), atol=1e-5), name
    gc.collect()
    assert state(model) == before


def test_one_cache_in_two_threads_is_refused_before_anything_is_computed() -> None:
    model, ids = MODELS["llama"], token_ids(12).clamp(min=1)[None]
    cache = LifespanCache(model, None, recent(3))
    inside, go_on, errors = Event(), Event(), []

    def hook(*_: Any) -> None:
        inside.set()
        assert go_on.wait(10)

    handle = model.model.layers[1].register_forward_hook(hook)
    thread = Thread(target=lambda: model.generate(ids, past_key_values=cache, **GREEDY))
    thread.start()
    try:
        assert inside.wait(10)
        for use in (
            lambda: model(ids, past_key_values=cache),
            lambda: model.generate(ids, past_key_values=cache, **GREEDY),
            cache.reset,
            cache.settle,
            lambda: copy.deepcopy(cache),
        ):
            with pytest.raises(SmartKVError, match="another thread uses this LifespanCache") as error:
                use()
            errors.append(error)
    finally:
        handle.remove()
        go_on.set()
        thread.join()
    assert len(errors) == 5 and cache.get_seq_length() == 12 + GREEDY["max_new_tokens"] - 1


def test_a_stream_that_nobody_reads_to_its_end_disturbs_no_other_call() -> None:
    model = llama(vocab_size=264, bos_token_id=256, eos_token_id=256)
    ids, before = token_ids(12).clamp(min=1)[None], state(model)
    want = model(ids).logits
    streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=10)
    options = GREEDY | {"max_new_tokens": 60}
    call = {"past_key_values": LifespanCache(model, None, recent(4)), "streamer": streamer, **options}
    thread = Thread(target=lambda: model.generate(ids, **call))
    thread.start()
    next(iter(streamer))  # and then no more
    while thread.is_alive():
        assert torch.allclose(model(ids).logits, want, atol=1e-5)
    thread.join()
    call.clear()
    del thread
    gc.collect()
    assert state(model) == before


def test_a_cache_that_is_detached_in_the_middle_of_another_threads_pass_lets_it_finish() -> None:
    model, ids = copy.deepcopy(MODELS["llama"]), token_ids(30, 3).clamp(min=1)[None]
    before, meet, found = state(model), Barrier(2), []
    want = uses(model, None)["recent"](ids[:, :12])
    gc.collect()
    cache = LifespanCache(model, None, recent(3), chunk=5)

    def wait_twice(*_: Any) -> None:
        meet.wait(10)
        meet.wait(10)

    handle = model.model.layers[0].register_forward_hook(wait_twice)
    thread = Thread(target=lambda: found.append(model(ids[:, :12], past_key_values=cache).logits))
    thread.start()
    meet.wait(10)
    handle.remove()
    cache.detach()
    meet.wait(10)
    thread.join()
    assert torch.allclose(found[0], want, atol=1e-5) and state(model) == before
    with pytest.raises(SmartKVError, match="detached"):
        model(ids[:, 12:], past_key_values=cache)


def test_a_call_inside_a_pass_is_a_call_of_its_own() -> None:
    model, ids = MODELS["llama"], token_ids(12)[None]
    want, found = model(ids).logits, []

    def hook(*_: Any) -> None:
        if not found:
            found.append(None)
            found.append(model(ids).logits)
            with pytest.raises(SmartKVError, match="inside a forward pass"):
                model(ids, past_key_values=cache)

    cache, fresh = LifespanCache(model, None, recent(3)), LifespanCache(model, None, recent(3))
    expected = model(ids, past_key_values=fresh).logits
    handle = model.model.layers[0].register_forward_hook(hook)
    got = model(ids, past_key_values=cache).logits
    handle.remove()
    assert torch.equal(found[1], want) and torch.equal(got, expected)


def test_the_view_of_a_config_is_the_config_but_for_the_attention_function() -> None:
    model = copy.deepcopy(MODELS["llama"])
    config, attention = model.config, model.model.layers[0].self_attn
    with LifespanCache(model, None, recent(3)):
        view = attention.config
        assert view is not config and isinstance(view, type(config)) and view.hidden_size == config.hidden_size
        view.note = 1
        assert config.note == 1 and view._attn_implementation == config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        assert view._attn_implementation == "eager"
        twin = copy.deepcopy(view)
        assert twin.note == 1 and twin.to_dict() == config.to_dict()
        assert copy.copy(view).note == 1
        other = copy.deepcopy(model)
        other.config.note = 2
        assert other.model.layers[0].self_attn.config.note == 2 and view.note == 1
    assert attention.config is config


def test_the_attention_function_of_a_pass_cannot_be_chosen_by_hand() -> None:
    model = copy.deepcopy(MODELS["llama"])
    model.config._attn_implementation = "smartkv_evicting"
    with pytest.raises(SmartKVError, match=r"chosen by model\(ids, past_key_values=cache\)"):
        model(token_ids(4)[None])
