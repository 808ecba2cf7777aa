"""What a layer asks of a GPU when it decodes from ranges: how much it starts, and that nothing waits for it."""

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from smartkv import LifespanCache
from tests.kernels import a_layer
from tests.models import llama, token_ids
from tests.smartkv.cache.fixtures import GATED, random_gates

if find_spec("triton") is None:
    pytest.skip("needs triton: make test-triton", allow_module_level=True)

LAUNCHES = 2  # of Triton's kernels in `range_attention`


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Caches decode from ranges, and their attention is counted and not computed."""
    counted: Counter[str] = Counter()

    def attention(query: Tensor, *_: Any) -> Tensor:
        counted["launches"] += LAUNCHES
        return torch.empty_like(query)

    monkeypatch.setattr("smartkv.cache.ranges.triton_runs", lambda device: True)
    monkeypatch.setattr("smartkv.kernels.range_attention.range_attention", attention)
    monkeypatch.setattr("smartkv.kernels.chunk_attention.chunk_attention", attention)
    return counted


def a_step(cache_of: Callable[[PreTrainedModel], Any]) -> Callable[[PreTrainedModel], Callable[[], object]]:
    """A step of decoding after a prompt and a first step, which packs the keys."""

    def prepare(model: PreTrainedModel) -> Callable[[], object]:
        cache, ids = cache_of(model), token_ids(40)
        for part in (ids[:38], ids[38:39]):
            model(part[None], past_key_values=cache)
        return lambda: model(ids[None, 39:], past_key_values=cache)

    return prepare


def build(layers: int) -> PreTrainedModel:
    return llama(num_hidden_layers=layers)


def lifespan_cache(model: PreTrainedModel) -> LifespanCache:
    return LifespanCache(model, random_gates(model), GATED)


def test_a_step_starts_four_kernels_of_the_caches_own_and_waits_for_none(launched: Counter[str]) -> None:
    """Key and value are stored, two kernels attend. That is less than a preallocated cache and its mask start."""
    ours, static = (a_layer(build, a_step(of)) for of in (lifespan_cache, lambda model: StaticCache(model.config, 64)))
    assert launched["launches"] and not ours.waited
    assert ours.started["index_copy_"] == 2
    assert ours.started.total() + LAUNCHES < static.started.total()


def test_a_prompt_starts_few_kernels_a_layer(launched: Counter[str]) -> None:
    """1,024 tokens after 1,024 others. A forward pass without a cache starts 33."""

    def prepare(model: PreTrainedModel) -> Callable[[], object]:
        cache, ids = lifespan_cache(model), token_ids(2048)
        model(ids[None, :1024], past_key_values=cache)
        return lambda: model(ids[None, 1024:], past_key_values=cache)

    ours = a_layer(lambda layers: llama(num_hidden_layers=layers, max_position_embeddings=2048), prepare)
    assert ours.started.total() + 1 <= 128  # pairs that are padded by groups of like lengths take 400
    assert ours.waited.total() <= 2
