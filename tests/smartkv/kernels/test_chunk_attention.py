"""Attention of a chunk, in Triton's interpreter, against the definition in float64. `make test-triton` runs it."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("needs triton: make test-triton", allow_module_level=True)

from smartkv.kernels.chunk_attention import chunk_attention
from smartkv.policies.lifetimes import FOREVER, HOLE

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def case(
    stored: list[int], tokens: int, group: int, head_dim: int, dtype: torch.dtype, seed: int, padding: bool
) -> dict[str, Tensor]:
    """Stored keys of any positions and ends, a chunk behind them, and gaps of what is not a number between pairs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).int()

    gaps, start, now = whole(0, 5, len(stored)).tolist(), 0, 100
    keys, values, positions, ends, firsts, places = [], [], [], [], [], []
    for count, gap in zip(stored, gaps, strict=True):
        place = now + torch.arange(tokens).int()
        if padding:  # on the left, as of a shorter row
            place = torch.cat([torch.full((tokens // 3,), HOLE), now + torch.arange(tokens - tokens // 3)]).int()
        keys += [torch.full((gap, head_dim), float("nan"), dtype=dtype), random(count + tokens, head_dim)]
        values += [torch.full((gap, head_dim), float("nan"), dtype=dtype), random(count + tokens, head_dim)]
        old = whole(0, now, count).where(whole(0, 9, count) > 0, torch.tensor(HOLE).int())
        positions += [torch.zeros(gap).int(), old, place]
        dying = torch.cat([whole(now - 5, now + 2 * tokens, count), place + whole(1, 2 * tokens, tokens)])
        ends += [torch.full((gap,), FOREVER).int(), torch.where(whole(0, 2, count + tokens) > 0, dying, FOREVER).int()]
        firsts.append(start + gap)
        places.append(place)
        start += gap + count + tokens
    return {
        "query": random(len(stored), group, tokens, head_dim),
        "keys": torch.cat(keys),
        "values": torch.cat(values),
        "positions": torch.cat(positions),
        "ends": torch.cat(ends),
        "firsts": torch.tensor(firsts).int(),
        "counts": torch.tensor(stored).int() + tokens,
        "places": torch.stack(places),
    }


def defined(inputs: dict[str, Tensor], scaling: float, cap: float | None, sinks: Tensor | None) -> Tensor:
    """A query at a time, in float64."""
    query = inputs["query"]
    output = torch.zeros_like(query, dtype=torch.float64)
    for pair, (first, count) in enumerate(zip(inputs["firsts"].tolist(), inputs["counts"].tolist(), strict=True)):
        slots = range(first, first + count)
        for token, place in enumerate(inputs["places"][pair].tolist()):
            seen = [s for s in slots if 0 <= inputs["positions"][s] <= place < inputs["ends"][s]]
            if place == HOLE or (not seen and sinks is None):
                continue
            for head in range(query.shape[1]):
                scores = inputs["keys"][seen].double() @ query[pair, head, token].double() * scaling
                scores = scores if cap is None else cap * (scores / cap).tanh()
                if sinks is not None:
                    scores = torch.cat([scores, sinks[pair, head, None].double()])
                output[pair, head, token] = scores.softmax(dim=0)[: len(seen)] @ inputs["values"][seen].double()
    return output


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    stored=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    tokens=st.integers(1, 40),
    group=st.sampled_from([1, 3, 4, 7]),
    head_dim=st.sampled_from([12, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    cap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_query_sees_the_keys_up_to_its_own_that_have_not_ended(
    stored: list[int],
    tokens: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    cap: float | None,
    sinks: bool,
    padding: bool,
    seed: int,
) -> None:
    inputs = case(stored, tokens, group, head_dim, dtype, seed, padding)
    own = torch.randn(len(stored), group, generator=torch.Generator().manual_seed(seed)) if sinks else None
    found = chunk_attention(**inputs, scaling=head_dim**-0.5, cap=cap, learned_sinks=own)
    want = defined(inputs, head_dim**-0.5, cap, own)
    assert found.dtype == dtype and found.isfinite().all()
    assert float((found.double() - want).norm() / want.norm().clamp(min=1e-3)) < TOLERANCE[dtype]


def test_a_query_of_padding_and_one_that_sees_nothing_get_zeros() -> None:
    inputs = case([5], 6, 3, 64, torch.float32, 0, padding=True)
    inputs["ends"][:] = 0  # nothing is seen by anyone
    assert (chunk_attention(**inputs, scaling=1.0) == 0).all()
    inputs["ends"][:] = FOREVER
    found = chunk_attention(**inputs, scaling=1.0)
    assert (found[:, :, :2] == 0).all() and (found[:, :, 2:] != 0).all()
