"""Attention functions registered with transformers, and the switch to one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.models.architecture import attention_modules
from smartkv.models.attention_interface import (
    AttentionInputs,
    attention_switched_to,
    default_scaling,
    register_attention,
)
from tests.models import FAMILIES, gpt2, llama, token_ids

NAME, ATTRIBUTE = "smartkv_test_recorded", "_recorded"
by_family = pytest.mark.parametrize("family", FAMILIES)


def plain_attention(inputs: AttentionInputs) -> Tensor:
    """Causal attention by a loop over heads and queries; records the call on the module's state."""
    query, key, value, window = inputs.query, inputs.key, inputs.value, inputs.sliding_window
    getattr(inputs.module, ATTRIBUTE).append((inputs.layer, inputs.dropout, window))
    output = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for i in range(query.shape[2]):
                first = 0 if window is None else max(0, i + 1 - window)
                scores = key[row, head // group, first : i + 1] @ query[row, head, i] * inputs.softmax.scaling
                output[row, head, i] = scores.softmax(dim=0) @ value[row, head // group, first : i + 1]
    return output


register_attention(NAME, plain_attention)


@by_family
@torch.no_grad()
def test_a_model_gives_the_same_logits_with_a_registered_attention(family: str) -> None:
    model, ids, calls = FAMILIES[family](), token_ids(14).view(2, 7), list[tuple[Any, ...]]()
    want = model(ids, use_cache=False).logits
    with attention_switched_to(model, NAME, ATTRIBUTE, calls):
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    window = 8 if family == "mistral_sliding" else None
    assert calls == [(0, 0.0, window), (1, 0.0, window)]


def test_transformers_builds_no_mask_for_a_registered_attention() -> None:
    assert AttentionMaskInterface()[NAME](batch_size=1, q_length=5, kv_length=5) is None


@pytest.mark.parametrize("changes", [
    {}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
])  # fmt: skip
@torch.no_grad()
def test_the_default_scaling_is_that_of_gpt2_s_own_attention(changes: dict[str, bool]) -> None:
    model, ids = gpt2(**changes), token_ids(7)[None]
    layers = attention_modules(model)
    model.set_attn_implementation("eager")
    want = model(ids, use_cache=False).logits

    def unscaled(module: nn.Module, *args: Any, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        return AttentionInterface()[NAME](module, *args, scaling=None, **kwargs)

    AttentionInterface.register("smartkv_test_unscaled", unscaled)
    AttentionMaskInterface.register("smartkv_test_unscaled", AttentionMaskInterface()[NAME])
    with attention_switched_to(model, "smartkv_test_unscaled", ATTRIBUTE, []):
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-5, rtol=1e-4)
    factors = [default_scaling(layer, 16) for layer in layers]
    whole = 1.0 if changes.get("scale_attn_weights") is False else 0.25
    assert factors == [whole, whole / 2 if "scale_attn_by_inverse_layer_idx" in changes else whole]


def state(model: PreTrainedModel) -> Any:
    """All that a switch could leave behind."""
    return model.config._attn_implementation, [sorted(vars(module)) for module in attention_modules(model)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_as_it_was_after_the_switch_and_after_an_exception(implementation: str) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    before, shared = state(model), object()
    with attention_switched_to(model, NAME, ATTRIBUTE, shared):
        assert model.config._attn_implementation == NAME
        assert all(getattr(module, ATTRIBUTE) is shared for module in attention_modules(model))
    assert state(model) == before
    with pytest.raises(KeyError), attention_switched_to(model, NAME, ATTRIBUTE, shared):
        raise KeyError
    assert state(model) == before
