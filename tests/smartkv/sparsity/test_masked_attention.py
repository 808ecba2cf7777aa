"""Anchors, schedules, and attention without the keys that were dropped."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.sparsity import Adaptive, Anchors, Fixed, Linear, sparse_attention, sparse_mask
from smartkv.sparsity.anchors import CLASSES, _kind, token_classes
from smartkv.sparsity.key_dropout import share_seen
from tests.models import FAMILIES, tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import kv_heads, padding, sliding, state
from tests.smartkv.cache.masked_reference import masked_logits, positions

# -- anchors ----------------------------------------------------------------------------------------------------------


def test_tokens_have_the_class_of_what_they_are() -> None:
    tokenizer = tiny_tokenizer()
    kinds = token_classes(tokenizer)

    def kind(text: str) -> str:
        (number,) = tokenizer(text)["input_ids"]
        return CLASSES[kinds[number]]

    assert [kind(text) for text in (".", ",", "$", "\n", "7", "a")] == [
        "punctuation",
        "punctuation",
        "punctuation",
        "newline",
        "number",
        "word_rest",
    ]
    assert CLASSES[kinds[tokenizer.eos_token_id]] == "special" and len(kinds) == len(tokenizer)


@given(st.integers(0, 6), st.booleans(), st.booleans(), st.lists(st.integers(0, 256), min_size=8, max_size=40))
def test_each_anchor_stays_when_it_is_asked_for_and_nothing_else_does(
    sinks: int, special: bool, punctuation: bool, ids: list[int]
) -> None:
    tokenizer = tiny_tokenizer()
    anchors = Anchors(sinks, 8, special, punctuation)
    stays = anchors.always(torch.tensor([ids]), anchors.table(tokenizer))[0]
    kinds = token_classes(tokenizer)
    for place, number in enumerate(ids):
        kind = CLASSES[kinds[number]]
        want = place < sinks or (special and kind == "special")
        want |= punctuation and kind in ("punctuation", "newline")
        assert bool(stays[place]) == want


def test_sinks_are_counted_from_the_first_real_token() -> None:
    tokenizer = tiny_tokenizer()
    ids, real = torch.full((1, 10), 65), torch.tensor([[False] * 4 + [True] * 6])
    anchors = Anchors(sinks=3, recent=1, special=False, punctuation=False)
    stays = anchors.always(ids, anchors.table(tokenizer), real)[0]
    assert stays.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_parts_of_a_letter_are_no_punctuation() -> None:
    assert _kind("\ufffd", "\ufffd") == "word_rest" and _kind(" \ufffd\ufffd", "Ġ") == "word_rest"


@given(st.integers(1, 12), st.integers(0, 19), st.lists(st.booleans(), min_size=20, max_size=20))
def test_the_share_that_is_seen_is_that_of_the_mask(recent: int, first: int, kept: list[bool]) -> None:
    stays = torch.tensor(kept).view(1, 1, 20)
    mask = sparse_mask(stays, recent)[0, 0, first:].double()
    want = mask.sum() / torch.ones(20, 20).tril()[first:].sum()
    assert float(share_seen(stays, recent, first)) == pytest.approx(float(want))


def test_anchors_that_are_none_are_refused() -> None:
    for wrong in ({"sinks": -1}, {"recent": 0}):
        with pytest.raises(SmartKVError):
            Anchors(**wrong)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_the_curriculum_goes_in_a_straight_line() -> None:
    found = [Linear(0.9, 0.3).keep_ratio(step, 101) for step in (0, 25, 50, 100, 200)]
    assert found == pytest.approx([0.9, 0.75, 0.6, 0.3, 0.3])
    assert Linear().keep_ratio(0, 1) == 0.9 and Fixed(0.4).keep_ratio(7, 9) == 0.4


def test_the_adaptive_schedule_falls_while_the_model_keeps_up_and_goes_on_as_it_was() -> None:
    schedule = Adaptive(0.9, 0.3, 0.1, 0.05)
    ratios = []
    for cost in (0.0, 0.04, 0.2, 0.05, -0.1):
        schedule.validated(cost)
        ratios.append(schedule.keep_ratio(0, 1))
    assert ratios == pytest.approx([0.8, 0.7, 0.8, 0.7, 0.6])
    again = Adaptive(0.9, 0.3, 0.1, 0.05)
    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for one in (schedule, again):
        one.validated(0.01)
    assert again.state_dict() == schedule.state_dict() and again.ratio == pytest.approx(0.5)


@given(st.lists(st.floats(0, 10), max_size=60))
def test_the_adaptive_schedule_stays_between_its_ends(losses: list[float]) -> None:
    schedule = Adaptive(0.9, 0.3, 0.07, 0.0)
    for loss in losses:
        schedule.validated(loss)
        assert 0.3 <= schedule.keep_ratio(0, 1) <= 0.9


def test_schedules_that_are_none_are_refused() -> None:
    for wrong in (
        lambda: Fixed(1.2),
        lambda: Linear(-0.1, 0.5),
        lambda: Adaptive(0.3, 0.9),
        lambda: Adaptive(change=2),
    ):
        with pytest.raises(SmartKVError):
            wrong()


# -- attention --------------------------------------------------------------------------------------------------------


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
        found = model(ids, position_ids=positions(real), use_cache=False).logits
    assert state(model) == before
    if side == "none":
        masks = [naive_mask(each, 5, real, sliding(model)) for each in stays]
        want = masked_logits(model, ids, masks, real)
        assert torch.allclose(found, want, atol=1e-4)
    else:  # the model's own sliding window counts columns, and padding among them: not compared
        masks = [naive_mask(each, 5, real, None) for each in stays]
        if sliding(model) is None:
            assert torch.allclose(found[real], masked_logits(model, ids, masks, real)[real], atol=1e-4)
    assert torch.isfinite(found).all()


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
