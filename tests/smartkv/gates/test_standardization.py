"""Streamed moments of keys against torch's mean and standard deviation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.gates.standardization import Moments
from tests.allocations import largest_allocation

quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10**6)
splits = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(seed=seeds, sizes=splits, offset=st.sampled_from([0, 300, -40]), half=st.booleans())
def test_moments_are_torchs_mean_and_std_however_the_rows_come(
    seed: int, sizes: list[int], offset: float, half: bool
) -> None:
    keys = offset + random(seed, 3, 1 + sum(sizes), 5)
    keys = keys.half() if half else keys
    target = random(seed + 1, 3, keys.shape[1])
    moments, start = Moments.zeros(3, 5), 0
    for size in [*sizes, 1]:
        moments.update(keys[:, start : start + size], target[:, start : start + size, None])
        start += size
    mean, std, mean_target = moments.result()
    torch.testing.assert_close(mean, keys.double().mean(dim=1).float())
    torch.testing.assert_close(std, keys.double().std(dim=1, correction=0).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mean_target[:, 0], target.double().mean(dim=1).float())


@pytest.mark.parametrize("value", [0.0, 1.0, 300.1, 60000.0])
def test_a_dimension_that_never_varies_gets_std_1(value: float) -> None:
    keys = random(0, 2, 1000, 3)
    keys[1, :, 2] = value
    moments = Moments.zeros(2, 3)
    for part in keys.split(7, dim=1):
        moments.update(part, part[..., :1])
    mean, std, _ = moments.result()
    assert std[1, 2] == 1
    assert mean[1, 2].item() == pytest.approx(value)
    assert (std.flatten()[:5] != 1).all()


def test_moments_are_summed_over_processes_by_their_tensors() -> None:
    keys, target = random(0, 2, 30, 3), random(1, 2, 30)
    whole, first, second = (Moments.zeros(2, 3) for _ in range(3))
    whole.update(keys, target[..., None])
    first.update(keys[:, :10], target[:, :10, None])
    second.update(keys[:, 10:], target[:, 10:, None])
    for total, other in zip(first.tensors(), second.tensors(), strict=True):
        total += other  # in place, as a reduction does
    for got, expected in zip(first.result(), whole.result(), strict=True):
        torch.testing.assert_close(got, expected)


def test_moments_widen_the_keys_of_one_gate_at_a_time() -> None:
    keys, target = torch.randn(50, 40, 8).half(), torch.randn(50, 40, 1)
    moments = Moments.zeros(50, 8)
    assert largest_allocation(lambda: moments.update(keys, target)) <= 8 * max(40 * 8, 50 * 40)
