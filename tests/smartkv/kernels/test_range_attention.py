"""Attention over ranges, in Triton's interpreter, against the definition in float64. `make test-triton` runs it."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("needs triton: make test-triton", allow_module_level=True)

from smartkv.kernels.range_attention import range_attention

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
quick = settings(deadline=None, max_examples=40, derandomize=True)


def defined(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax over each range, a head at a time, in float64."""
    output = torch.zeros_like(query, dtype=torch.float64)
    for pair, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        seen = slice(start, start + length)
        for head in range(query.shape[1]):
            scores = keys[seen].double() @ query[pair, head].double() * scaling
            if cap is not None:
                scores = cap * (scores / cap).tanh()
            if sinks is not None:
                scores = torch.cat([scores, sinks[pair, head, None].double()])
            if len(scores):
                output[pair, head] = scores.softmax(dim=0)[:length] @ values[seen].double()
    return output


def case(lengths: list[int], group: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """An arena with gaps between the ranges; what lies in the gaps is not a number."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    gaps = torch.randint(0, 9, (len(lengths) + 1,), generator=generator).tolist()
    keys, values = (torch.full((sum(lengths) + sum(gaps), head_dim), float("nan"), dtype=dtype) for _ in range(2))
    starts, slot = [], 0
    for length, gap in zip(lengths, gaps, strict=False):
        slot += gap
        starts.append(slot)
        keys[slot : slot + length], values[slot : slot + length] = random(length, head_dim), random(length, head_dim)
        slot += length
    ranges = {"starts": torch.tensor(starts).int(), "lengths": torch.tensor(lengths).int()}
    return {"query": random(len(lengths), group, head_dim), "keys": keys, "values": values} | ranges


def error(found: Tensor, want: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - want).norm() / want.norm().clamp(min=1e-9))


@quick
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    group=st.sampled_from([1, 3, 4, 7]),
    head_dim=st.sampled_from([12, 64, 80, 128]),
    splits=st.sampled_from([1, 2, 8, 16]),
    block=st.sampled_from([16, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_softmax_over_each_range(
    lengths: list[int], group: int, head_dim: int, splits: int, block: int, dtype: torch.dtype, seed: int
) -> None:
    inputs = case(lengths, group, head_dim, dtype, seed)
    found = range_attention(**inputs, scaling=head_dim**-0.5, splits=splits, block=block)
    assert found.dtype == dtype
    assert error(found, defined(**inputs, scaling=head_dim**-0.5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 8])
def test_a_pair_that_sees_nothing_gets_zeros(splits: int) -> None:
    found = range_attention(**case([0, 5, 0], 3, 64, torch.float32), scaling=0.125, splits=splits)
    assert (found[0] == 0).all() and (found[2] == 0).all() and (found[1] != 0).all()


def test_scores_are_capped_and_sinks_take_their_weight() -> None:
    inputs = case([70, 1, 0], 4, 64, torch.float32)
    sinks = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    for cap, own in ((5.0, None), (None, sinks), (5.0, sinks)):
        found = range_attention(**inputs, scaling=1.0, cap=cap, learned_sinks=own, splits=2)
        assert error(found, defined(**inputs, scaling=1.0, cap=cap, sinks=own)) < 2e-6


def test_scores_that_overflow_a_naive_exponential_are_exact() -> None:
    inputs = case([90], 3, 64, torch.float32)
    found = range_attention(**inputs, scaling=20.0, splits=4, block=16)
    assert error(found, defined(**inputs, scaling=20.0)) < 1e-5
