"""Streamed moments of keys against torch's mean and standard deviation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.gates.standardization import Moments, StandardizedGates, key_moments
from tests.allocations import largest_allocation
from tests.models import llama
from tests.smartkv.cache.fixtures import random_gates

quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10**6)
splits = st.lists(st.integers(1, 9), min_size=1, max_size=5)

HEAD_DIM = 8


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


def shifted_keys(layers: int, windows: int = 2) -> list[list[Tensor]]:
    """Keys of two heads whose means lie up to 300 times their deviation from 0."""
    far = 100 * random(9, layers, 1, 2, 1, HEAD_DIM)
    return [[far[layer] + 0.3 * random(10 * w + layer, 1, 2, 7, HEAD_DIM) for layer in range(layers)]
            for w in range(windows)]  # fmt: skip


def test_moments_of_windows_are_those_of_their_keys_side_by_side() -> None:
    windows = shifted_keys(3)
    mean, std = key_moments(windows, [0, 2])
    for gate, (layer, head) in enumerate([(0, 0), (0, 1), (2, 0), (2, 1)]):
        rows = torch.cat([window[layer][0, head] for window in windows]).double()
        torch.testing.assert_close(mean[gate], rows.mean(dim=0).float())
        torch.testing.assert_close(std[gate], rows.std(dim=0, correction=0).float(), atol=1e-4, rtol=1e-4)
    with pytest.raises(SmartKVError, match="at least one window"):
        key_moments([], [0])


def test_standardised_gates_say_what_the_raw_ones_say_and_become_them_again() -> None:
    gates = random_gates(llama())
    windows = shifted_keys(len(gates.layers))
    standard = StandardizedGates(gates, windows)
    for layer in gates.layers:
        torch.testing.assert_close(standard.predict(layer, windows[0][layer]), gates.predict(layer, windows[0][layer]),
                                   atol=1e-3, rtol=1e-3)  # fmt: skip
    torch.testing.assert_close(standard.raw().state_dict(), gates.state_dict(), atol=1e-4, rtol=1e-4)


def test_a_step_moves_gates_as_far_wherever_their_keys_lie() -> None:
    """The change of what gates say after one step of Adam, with keys around 0 and with the same keys elsewhere."""
    moved = []
    for offset in (0.0, 1.0):
        gates = random_gates(llama())
        layers = len(gates.layers)
        keys = [[random(layer, 1, 2, 50, HEAD_DIM) + offset * 300 for layer in range(layers)]]
        gates.bias1.data -= offset * 300 * gates.weight1.data.sum(dim=1, keepdim=True)  # so that they say the same
        standard = StandardizedGates(gates, keys)
        optimizer = torch.optim.Adam(standard.parameters(), lr=0.002)
        before = standard.predict(0, keys[0][0])
        before.square().mean().backward()
        optimizer.step()
        moved.append(float((standard.predict(0, keys[0][0]) - before).abs().mean()))
    assert moved[1] == pytest.approx(moved[0], rel=0.1) and moved[0] > 0


def test_a_checkpoint_of_gates_on_raw_keys_is_read() -> None:
    gates = random_gates(llama())
    standard = StandardizedGates(gates, shifted_keys(len(gates.layers)))
    old = {f"bank.{name}": tensor for name, tensor in gates.state_dict().items()} | {"other": torch.ones(1)}
    new = standard.named_as_here(old, "bank.")
    assert new.pop("other") == 1
    standard.load_state_dict({name.removeprefix("bank."): tensor for name, tensor in new.items()})
    torch.testing.assert_close(standard.raw().state_dict(), gates.state_dict(), atol=0, rtol=0)
    state = {f"bank.{name}": tensor for name, tensor in standard.state_dict().items()}
    assert standard.named_as_here(state, "bank.") is state
