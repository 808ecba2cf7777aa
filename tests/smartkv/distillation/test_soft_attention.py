"""Attention under soft eviction against plain loops, against the hard rule, and through a model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.distillation.soft_attention import soft_attention, soft_eviction
from smartkv.models.architecture import Fingerprint
from smartkv.models.softmax import Softmax
from tests.families import OWN_SOFTMAX, make
from tests.models import FAMILIES, qwen2_mixed, token_ids
from tests.smartkv.cache.fixtures import MODELS, random_ttl, sliding
from tests.smartkv.cache.masked_reference import masked_logits, visibility


def model_of(family: str) -> PreTrainedModel:
    return MODELS[family] if family in MODELS else make(family)


def naive(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, softmax: Softmax, ages: list[int], sinks: int, own: int
) -> Tensor:
    """Soft attention in plain loops, one query at a time."""
    group, rows = q.shape[1] // k.shape[1], []
    for row in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            outputs = []
            for i in range(q.shape[2]):
                weights = []
                for j in range(max(0, i - own + 1), i + 1):
                    score = q[row, head, i] @ k[row, head // group, j] * softmax.scaling
                    weight = (score if softmax.cap is None else (score / softmax.cap).tanh() * softmax.cap).exp()
                    reached = [age for age, until in enumerate(ages) if i - j >= until]
                    in_full = not reached or j < sinks
                    weights.append(weight if in_full else weight * keep[reached[-1], row, head // group, j])
                total = torch.stack(weights)
                nothing = 0.0 if softmax.learned_sinks is None else softmax.learned_sinks[head].exp()
                outputs.append((total / (total.sum() + nothing)) @ v[row, head // group, i + 1 - len(weights) : i + 1])
            heads.append(torch.stack(outputs))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 14),
    ages=st.sets(st.integers(1, 16), min_size=1, max_size=4).map(sorted),
    sinks=st.integers(0, 4),
    own=st.one_of(st.none(), st.integers(1, 14)),
    tile=st.integers(1, 16),
    cap=st.sampled_from([None, 0.5]),
    learned=st.booleans(),
)
def test_output_and_gradients_are_those_of_plain_loops(
    seed: int, tokens: int, ages: list[int], sinks: int, own: int | None, tile: int, cap: float | None, learned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    q, k, v, log_keep = (
        draw(2, 4, tokens, 3),
        draw(2, 2, tokens, 3),
        draw(2, 2, tokens, 3),
        draw(len(ages), 2, 2, tokens),
    )
    inputs, softmax = [q, k, v, log_keep], Softmax(0.7, cap, draw(4) if learned else None)
    if softmax.learned_sinks is not None:
        inputs.append(softmax.learned_sinks)
    grad = torch.randn(2, 4, tokens, 3, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smartkv.distillation.soft_attention.TILE", tile)
        got = soft_attention(q, k, v, log_keep, softmax, tuple(ages), sinks, own)
        got_gradients = torch.autograd.grad(got, inputs, grad)
    want = naive(q, k, v, log_keep.exp(), softmax, ages, sinks, own or tokens)
    want_gradients = torch.autograd.grad(want, inputs, grad, allow_unused=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    for own, plain in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if plain is None else plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_SOFTMAX, "qwen3_next"])
def test_keeping_all_or_nothing_is_the_hard_rule(family: str) -> None:
    model, tokens, ages = model_of(family), 18, (3, 6, 11)
    ids, real = token_ids(2 * tokens, 3).view(2, tokens), torch.ones(2, tokens, dtype=torch.bool)
    drawn = random_ttl(model, 2, tokens, 5)  # [layers, batch, kv_heads, tokens]
    ttl = torch.tensor([3, 6, 11, 1000])[drawn % 4]
    masks = [visibility(layer, 3, 2, real, sliding(model)) for layer in ttl]

    def log_keep(layer: int, _: Tensor) -> Tensor:
        return torch.stack([torch.where(ttl[layer] > age, 0.0, -1e4) for age in ages])

    with torch.inference_mode(), soft_eviction(model, log_keep, ages, 2):
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, masked_logits(model, ids, masks, real), atol=1e-4, rtol=0)
    assert ttl.unique().tolist() == [3, 6, 11, 1000]


def test_a_layer_without_shares_sees_what_its_own_window_shows() -> None:
    model, ids, real = qwen2_mixed(), token_ids(30, 3).view(1, 30), torch.ones(1, 30, dtype=torch.bool)
    ttl = torch.tensor([4, 1000])[random_ttl(model, 1, 30, 5)[1] % 2]
    with (
        torch.inference_mode(),
        soft_eviction(model, lambda layer, _: torch.where(ttl > 4, 0.0, -1e4)[None] if layer == 1 else None, (4,), 2),
    ):
        got = model(ids, use_cache=False).logits
    always = torch.full_like(ttl, 1000)
    masks = [visibility(always, 4, 0, real, 8), visibility(ttl, 4, 2, real, None)]
    torch.testing.assert_close(got, masked_logits(model, ids, masks, real), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_SOFTMAX, "qwen3_next"])
def test_the_loss_tells_a_gate_of_the_first_layer_what_its_key_is_worth(family: str) -> None:
    """Compare the gradient with a difference quotient through the whole model."""
    model, ids = model_of(family), token_ids(16, 2)[None]
    log_keep = torch.full((2, 2, 1, Fingerprint.of(model).kv_heads, 16), -0.5, requires_grad=True)
    direction = torch.zeros_like(log_keep)
    direction[0, 1, 0, 1, 3:9] = 1.0  # of the second age

    def loss(log_keep: Tensor) -> Tensor:
        with soft_eviction(model, lambda layer, _: log_keep[layer], (2, 5), 1):
            return model(ids, labels=ids, use_cache=False).loss

    (gradient,) = torch.autograd.grad(loss(log_keep), log_keep)
    with torch.no_grad():
        quotient = (loss(log_keep + 0.01 * direction) - loss(log_keep - 0.01 * direction)) / 0.02
    torch.testing.assert_close((gradient * direction).sum(), quotient, atol=2e-4, rtol=0.02)
    assert abs(float(quotient)) > 1e-4


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    model, ids = MODELS["qwen2"], token_ids(9)[None]
    before, implementation = model(ids).logits, model.config._attn_implementation

    def broken(layer: int, keys: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), soft_eviction(model, broken, (4,)):
        model(ids, use_cache=False)
    assert model.config._attn_implementation == implementation and torch.equal(model(ids).logits, before)
    assert not any(name.startswith("_smartkv") for module in model.modules() for name in vars(module))
