"""Attention without the keys that were dropped, against a naive masked model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smartkv.sparsity import sparse_attention, sparse_mask
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import kv_heads, padding, sliding, state
from tests.smartkv.cache.masked_reference import masked_logits, positions


def naive_mask(stays: Tensor, recent: int, real: Tensor, sliding_window: int | None) -> Tensor:
    batch, heads, tokens = stays.shape
    mask = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for row in range(batch):
        places = real[row].nonzero().flatten().tolist()
        for head in range(heads):
            for i, column_i in enumerate(places):
                for j, column_j in enumerate(places[: i + 1]):
                    seen = bool(stays[row, head, column_j]) or i - j < recent
                    mask[row, head, column_i, column_j] = seen and (sliding_window is None or i - j < sliding_window)
        for column in set(range(tokens)) - set(places):
            mask[row, :, column, column] = True
    return mask


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_naive_masked_model(family: str, side: str) -> None:
    model, ids = FAMILIES[family](), token_ids(90).view(3, 30)
    real = torch.ones(3, 30, dtype=torch.bool) if side == "none" else padding(3, 30, side, 1)
    random = torch.Generator().manual_seed(2)
    shape = (model.config.num_hidden_layers, 3, kv_heads(model), 30)
    stays = torch.rand(shape, generator=random) < 0.4
    before = state(model)
    with (
        torch.inference_mode(),
        sparse_attention(model, lambda layer: stays[layer], 5, None if side == "none" else real),
    ):
        logits = model(ids, position_ids=positions(real), use_cache=False).logits
    assert state(model) == before
    if side == "none":
        masks = [naive_mask(each, 5, real, sliding(model)) for each in stays]
        want = masked_logits(model, ids, masks, real)
        assert torch.allclose(logits, want, atol=1e-4)
    else:  # the model's own sliding window counts columns, and padding among them: not compared
        masks = [naive_mask(each, 5, real, None) for each in stays]
        if sliding(model) is None:
            assert torch.allclose(logits[real], masked_logits(model, ids, masks, real)[real], atol=1e-4)
    assert torch.isfinite(logits).all()


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_a_query_sees_the_recent_ones_and_nothing_of_the_future(tokens: int, recent: int, seed: int) -> None:
    stays = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask = sparse_mask(stays, recent)[0]
    for i in range(tokens):
        assert not mask[:, i, i + 1 :].any() and mask[:, i, max(0, i - recent + 1) : i + 1].all()
        assert torch.equal(mask[:, i, : max(0, i - recent + 1)], stays[0, :, : max(0, i - recent + 1)])


def test_gradients_flow_and_an_exception_leaves_the_model_as_it_was() -> None:
    model, ids = FAMILIES["qwen2"](), token_ids(20)[None]
    before = state(model)
    stays = torch.zeros(1, 2, 20, dtype=torch.bool)
    with sparse_attention(model, lambda _: stays, 4):
        model(ids, labels=ids, use_cache=False).loss.backward()
    gradient = model.base_model.layers[0].self_attn.k_proj.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    with pytest.raises(ZeroDivisionError), sparse_attention(model, lambda _: stays, 4):
        math.floor(1 / 0)
    assert state(model) == before
