"""A hash of weights in every form in which they are stored."""

import pytest
import torch
from torch import nn

from smartkv.models.weight_hash import weight_hash
from tests.models import llama
from tests.wrapped_models import PACKED, lora, offloaded_to_disk, offloaded_to_memory


def hash_of(model: nn.Module) -> str:
    return weight_hash(next(module for name, module in model.named_modules() if name.endswith("k_proj")))


def test_the_dtype_of_weights_changes_nothing() -> None:
    hashes = {hash_of(llama().to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
    assert hashes == {"606ae099cdbd7cfe"}  # as gates and shards of earlier versions have it


@pytest.mark.parametrize("wrap", [lora, offloaded_to_memory, offloaded_to_disk])
def test_weights_under_an_adapter_or_offloaded_are_the_model_s_own(wrap: object) -> None:
    assert hash_of(wrap(llama())) == hash_of(llama())  # type: ignore[operator]


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_have_a_hash_that_tells_others_apart(form: str) -> None:
    first, again, other = (hash_of(PACKED[form](llama(seed))) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_weights_in_a_dtype_without_signs_tell_others_apart(dtype: torch.dtype) -> None:
    """bitsandbytes packs two weights of 4 bits into a uint8."""

    def stored(seed: int) -> nn.Module:
        module = nn.Linear(4, 4, bias=False)
        content = torch.randint(0, 256, (4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        module.weight = nn.Parameter(content.view(dtype), requires_grad=False)
        return module

    assert weight_hash(stored(0)) == weight_hash(stored(0)) != weight_hash(stored(1))


def test_weights_that_are_not_there_have_none() -> None:
    assert weight_hash(nn.Linear(4, 4, device="meta")) == ""
    assert weight_hash(nn.ReLU()) == ""
