"""Caches on a GPU give the logits that they give on the CPU."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import GATED, fed, padding, random_gates

pytestmark = pytest.mark.gpu
TOKENS, ROWS = 100, 3


def both(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model on the CPU and on the GPU."""
    return FAMILIES[family](), FAMILIES[family]().cuda()


def gated(model: PreTrainedModel, ids: Tensor, real: Tensor, **options: object) -> tuple[Tensor, LifespanCache]:
    """Logits on the CPU; half of the tokens are fed one by one."""
    gates = random_gates(model).to(model.device)
    cache = LifespanCache(model, gates, replace(GATED, **options.pop("policy", {})), chunk=16, **options)
    found = fed(model, cache, ids.to(model.device), real.to(model.device), range(TOKENS // 2, TOKENS))
    return found.cpu(), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_evicts_gives_the_same_logits(family: str) -> None:
    """Three rows, padded on the left."""
    ids, real = token_ids(ROWS * TOKENS, 1).view(ROWS, TOKENS), torch.ones(ROWS, TOKENS).bool()
    real[:, :20] = padding(ROWS, 20, "left", 2)
    (cpu, one), (gpu, other) = (gated(model, ids, real) for model in both(family))
    torch.testing.assert_close(gpu[real], cpu[real], atol=2e-3, rtol=1e-3)
    assert torch.equal(other.live_keys.cpu(), one.live_keys)
    assert other.storage_bytes == one.storage_bytes


@pytest.mark.parametrize("per", ["head", "layer"])
def test_a_cap_holds(per: str) -> None:
    ids, real = token_ids(TOKENS, 2)[None], torch.ones(1, TOKENS).bool()
    policy = {"max_tokens": 24, "max_tokens_per": per}
    (cpu, one), (gpu, other) = (gated(model, ids, real, policy=policy) for model in both("llama"))
    torch.testing.assert_close(gpu, cpu, atol=2e-3, rtol=1e-3)
    assert torch.equal(other.live_keys.cpu(), one.live_keys)


def test_a_cache_that_evicts_and_packs_gives_nearly_the_same_logits() -> None:
    ids, real = token_ids(TOKENS, 3)[None], torch.ones(1, TOKENS).bool()
    (cpu, one), (gpu, other) = (gated(model, ids, real, bits=(8, 8)) for model in both("llama"))
    torch.testing.assert_close(gpu, cpu, atol=0.05, rtol=0.05)  # a rounding may fall the other way
    assert other.storage_bytes == one.storage_bytes


@torch.inference_mode()
def read(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Tensor:
    parts = [model(part, past_key_values=cache).logits for part in ids.to(model.device).split(4, dim=1)]
    return torch.cat(parts, dim=1).cpu()


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "kivi", "kivi2", "kivi4"])
def test_a_cache_that_quantises_gives_nearly_the_same_logits(scheme: str) -> None:
    ids, (cpu, gpu) = token_ids(2 * TOKENS).view(2, -1), both("llama")
    one, other = (QuantizedCache(model, scheme) for model in (cpu, gpu))
    apart = (read(gpu, other, ids) - read(cpu, one, ids)).abs()
    assert float(apart.mean()) < 5e-3  # a rounding may fall the other way
    assert other.storage_bytes == one.storage_bytes


@pytest.mark.parametrize("by_gates", [False, True])
def test_adaptive_precision_gives_nearly_the_same_logits(by_gates: bool) -> None:
    found = []
    for model in (llama(), llama().cuda()):
        with AdaptiveCache(model, random_gates(model).to(model.device) if by_gates else None) as cache:
            found.append(read(model, cache, token_ids(2 * TOKENS).view(2, -1)))
    assert float((found[0] - found[1]).abs().mean()) < 5e-3


def test_a_cache_is_saved_loaded_and_copied_there(tmp_path: Path) -> None:
    model, ids, real = llama().cuda(), token_ids(TOKENS, 4)[None], torch.ones(1, TOKENS).bool()
    gates, more = random_gates(model).cuda(), token_ids(8, 5)[None].cuda()
    _, cache = gated(model, ids, real)
    save_cache(cache, tmp_path / "cache.safetensors")
    logits = []
    for again in (deepcopy(cache), load_cache(tmp_path / "cache.safetensors", model, gates)):
        with again, torch.inference_mode():
            logits.append(model(more, past_key_values=again, use_cache=True).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
