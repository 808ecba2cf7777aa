"""The keys that are left, and the statistics of queries, against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from smartkv.baselines.state import LATEST, LiveKeys, Needs
from smartkv.models.rotary import Rotation
from smartkv.models.softmax import Softmax
from tests.models import gpt2, llama

HEADS, GROUP, DIM, SCALING = 2, 3, 6, 0.4
NO_ROTATION = Rotation(gpt2())


def drawn(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[HEADS, GROUP, tokens, DIM]`, keys and values `[HEADS, tokens, DIM]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, GROUP, tokens, DIM), (HEADS, tokens, DIM), (HEADS, tokens, DIM)
    queries, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return queries, key, value


def read_in_parts(needs: Needs, parts: list[int], seed: int = 0) -> tuple[LiveKeys, tuple[Tensor, Tensor, Tensor]]:
    """Tokens added and attended in parts of these sizes, with nothing evicted."""
    queries, key, value = drawn(seed, sum(parts))
    live, start = LiveKeys(0, HEADS, Softmax(SCALING), NO_ROTATION, needs), 0
    for size in parts:
        part = slice(start, start + size)
        live.add(queries[:, :, part], key[:, part], value[:, part])
        live.attend(queries[:, :, part], start, None)
        start += size
    return live, (queries, key, value)


def plain_weights(query: Tensor, key: Tensor, visible: list[bool]) -> list[float]:
    raw = [math.exp(float(query @ one) * SCALING) if sees else 0.0 for one, sees in zip(key, visible, strict=True)]
    return [weight / sum(raw) for weight in raw]


def test_keys_stand_in_the_order_they_came_however_they_are_added() -> None:
    live, (_, key, value) = read_in_parts("keys", [4, 1, 7])
    assert torch.equal(live.key, key) and torch.equal(live.value, value)
    assert live.position.tolist() == [list(range(12))] * HEADS and live.count == live.read == 12


def test_only_the_keys_that_are_kept_are_left_in_order() -> None:
    live, (_, key, value) = read_in_parts("attention weights", [5, 5])
    before, kept = live.accumulated.clone(), torch.tensor([[7, 0, 3], [9, 8, 1]])
    live.keep(kept)
    assert live.position.tolist() == [[0, 3, 7], [1, 8, 9]] and live.count == 3 and live.read == 10
    for head in range(HEADS):
        positions = live.position[head]
        assert torch.equal(live.key[head], key[head, positions])
        assert torch.equal(live.value[head], value[head, positions])
        assert torch.equal(live.accumulated[head], before[head, positions])


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_the_newest_queries_attend_to_what_is_left_before_them(sliding_window: int | None) -> None:
    live, _ = read_in_parts("keys", [9])
    live.keep(torch.tensor([[0, 6, 7, 8], [2, 3, 7, 8]]))
    queries, key, value = drawn(1, 3)
    live.add(queries, key, value)
    output, seen = live.attend(queries, 9, sliding_window)
    for head in range(HEADS):
        for number in range(3):
            place = 9 + number
            oldest = place - sliding_window + 1 if sliding_window else 0
            visible = [oldest <= position <= place for position in live.position[head].tolist()]
            assert int(seen[head, number]) == sum(visible)
            for query in range(GROUP):
                weights = plain_weights(queries[head, query, number], live.key[head], visible)
                mixed = sum(weight * one for weight, one in zip(weights, live.value[head], strict=True))
                torch.testing.assert_close(output[head, query, number], mixed, atol=1e-5, rtol=1e-4)


def test_attention_is_summed_over_queries_and_averaged_over_the_group() -> None:
    live, (queries, key, _) = read_in_parts("attention weights", [3, 5])
    for head in range(HEADS):
        total = [0.0] * 8
        for place in range(8):
            for query in range(GROUP):
                weights = plain_weights(queries[head, query, place], key[head], [p <= place for p in range(8)])
                total = [so_far + weight / GROUP for so_far, weight in zip(total, weights, strict=True)]
        assert live.accumulated[head].tolist() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("needs", ["keys", "queries"])
def test_attention_is_not_summed_where_no_method_needs_it(needs: Needs) -> None:
    assert not read_in_parts(needs, [3, 5])[0].accumulated.any()


def test_the_latest_queries_are_those_of_the_last_tokens_across_parts() -> None:
    live, (queries, key, _) = read_in_parts("attention weights", [40, 1, 40])
    assert torch.equal(live.latest, queries[:, :, -LATEST:])
    attention = live.attention_of_latest(5)
    assert attention.shape == (HEADS, GROUP, 5, 81)
    for number in range(5):
        place = 76 + number
        weights = plain_weights(queries[1, 2, place], key[1], [p <= place for p in range(81)])
        assert attention[1, 2, number].tolist() == pytest.approx(weights, abs=1e-5)


def test_queries_are_summed_as_they_were_before_the_rotary_embedding() -> None:
    model = llama()
    rotation, position = Rotation(model), torch.arange(10)
    cos, sin = model.base_model.rotary_emb(torch.zeros(1), position[None])
    plain = torch.randn(HEADS, GROUP, 10, 8, generator=torch.Generator().manual_seed(0))
    half = torch.cat([-plain[..., 4:], plain[..., :4]], dim=-1)
    rotated = plain * cos[0] + half * sin[0]
    live = LiveKeys(0, HEADS, Softmax(SCALING), rotation, "queries")
    for part in (slice(0, 6), slice(6, 10)):
        key = torch.zeros(HEADS, part.stop - part.start, 8)
        live.add(rotated[:, :, part], key, key)
    torch.testing.assert_close(live.query_sum, plain.sum(dim=2), atol=1e-5, rtol=1e-4)
    outer = sum(torch.einsum("hgi,hgj->hgij", plain[:, :, t], plain[:, :, t]) for t in range(10))
    torch.testing.assert_close(live.query_outer_sum, outer, atol=1e-5, rtol=1e-4)
