"""A compiled model gives a cache the logits that it gives uncompiled, and goes on compiled without a cache."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.uncompiled import uncompiled
from tests.models import token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, random_gates

compiled_graphs: list[int] = []


def counting(graph: Any, _: Any) -> Any:
    """A backend that runs a graph as it is, and counts how often."""

    def run(*args: Any) -> Any:
        compiled_graphs.append(1)
        return graph(*args)

    return run


def decoder_forward(model: Any) -> None:
    model.model.forward = torch.compile(model.model.forward, backend=counting)


def whole_module(model: Any) -> None:
    model.compile(backend=counting)


def each_layer(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend=counting)


@pytest.mark.parametrize("compile_part", [decoder_forward, whole_module, each_layer])
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_compiled_model_attends_through_the_cache(compile_part: Callable[[Any], None], when: str) -> None:
    torch._dynamo.reset()
    model, ids = copy.deepcopy(MODELS["llama"]), token_ids(16).clamp(min=1)[None]
    gates, plain = random_gates(model), model(ids).logits

    def with_cache() -> Tensor:
        cache = LifespanCache(model, gates, GATED)
        with torch.no_grad():
            first = model(ids[:, :12], past_key_values=cache).logits
            rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 16)]
        return torch.cat([first, *rest], dim=1)

    want = with_cache()
    keep = LifespanCache(model, gates, GATED) if when == "while" else None
    compile_part(model)
    if when == "before":
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
    assert torch.allclose(with_cache(), want, atol=1e-5)
    del keep
    gc.collect()
    compiled_graphs.clear()
    assert torch.allclose(model(ids).logits, plain, atol=1e-5) and compiled_graphs


def test_the_compiler_is_as_it_was_when_the_last_pass_has_ended() -> None:
    torch._dynamo.reset()
    double = torch.compile(lambda tensor: tensor * 2, backend=counting)
    compiled_graphs.clear()
    with uncompiled():
        with uncompiled():
            double(torch.ones(1))
        double(torch.ones(1))
        assert not compiled_graphs
    double(torch.ones(1))
    assert compiled_graphs


# -- a model that is patched or restored meanwhile --------------------------------------------------------------------


def compiled_while(model: Any, happens: Callable[[], None]) -> Any:
    """The model compiled as a whole, with something that happens once, while the compiler works on its first call."""
    pending = [happens]

    def backend(graph: Any, _: Any) -> Any:
        if pending:
            pending.pop()()
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def in_another_thread(happens: Callable[[], None]) -> None:
    thread = threading.Thread(target=happens)
    thread.start()
    thread.join(timeout=0.5)  # one that waits for the compiler goes on when it has compiled


def is_patched(model: Any) -> bool:
    return "forward" in model.model.__dict__


@torch.no_grad()
@pytest.mark.parametrize("by", ["collector", "thread"])
def test_a_cache_may_die_while_its_model_is_compiled(by: str) -> None:
    model, ids = copy.deepcopy(MODELS["llama"]), token_ids(16)[None]
    plain, alive = model(ids).logits, {"cache": LifespanCache(model, policy="full")}
    if by == "collector":
        alive["cache"].itself = alive["cache"]  # type: ignore[attr-defined] # so that the collector alone frees it
    gc.disable()
    try:
        if by == "collector":
            alive.clear()
            compiled = compiled_while(model, lambda: (gc.collect(), None)[1])
        else:
            compiled = compiled_while(model, lambda: in_another_thread(alive.clear))
        assert is_patched(model)
        for _ in range(2):
            assert torch.allclose(
                compiled(ids, past_key_values=QuantizedCache(compiled, "fp16")).logits, plain, atol=0.1
            )
    finally:
        gc.enable()
    assert torch.allclose(model(ids).logits, plain, atol=1e-5)
    assert not is_patched(model)  # the plain call restored what had to wait


@torch.no_grad()
def test_a_cache_may_be_born_in_another_thread_while_its_model_is_compiled() -> None:
    model, ids, caches = copy.deepcopy(MODELS["llama"]), token_ids(16)[None], []
    plain, born = model(ids).logits, threading.Event()

    def bear() -> None:
        caches.append(LifespanCache(model, policy="full"))
        born.set()

    compiled = compiled_while(model, lambda: in_another_thread(bear))
    assert torch.allclose(compiled(ids).logits, plain, atol=1e-5)
    assert born.wait(timeout=10) and is_patched(model)
    assert torch.allclose(compiled(ids, past_key_values=caches[0]).logits, plain, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_anew_for_each_cache() -> None:
    torch._dynamo.reset()
    model, ids, graphs = copy.deepcopy(MODELS["llama"]), token_ids(16)[None], []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph.forward)
    caches = [LifespanCache(model, policy="full")]
    compiled(ids)
    before = len(graphs)
    for _ in range(3):
        caches.append(LifespanCache(model, policy="full"))
        compiled(ids)
    assert len(graphs) == before > 0
