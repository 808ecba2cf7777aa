"""A compiled model gives a cache the logits that it gives uncompiled, and goes on compiled without a cache."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smartkv.cache.lifespan_cache import LifespanCache
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
