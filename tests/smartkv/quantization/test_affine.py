"""Codes in few bits, against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartkv.errors import SmartKVError
from smartkv.quantization.affine import BITS, dequantize, hadamard, pack, packed_bytes, quantize, unpack
from tests.smartkv.quantization.fixtures import naive

floats = st.floats(-1e4, 1e4, width=32)


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(0, 2**31))
def test_what_is_packed_comes_out_again_and_fills_its_bytes(bits: int, groups: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 8 * groups), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, groups * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    eight = torch.arange(8, dtype=torch.uint8)
    number = int.from_bytes(bytes(pack(eight, 3).tolist()), "little")
    assert [number >> (3 * place) & 7 for place in range(8)] == list(range(8))


@given(st.sampled_from(BITS), st.lists(floats, min_size=16, max_size=16))
def test_quantised_values_are_those_of_plain_loops(bits: int, values: list[float]) -> None:
    found = dequantize(quantize(torch.tensor(values), bits, 8), bits, torch.float32)
    for start in (0, 8):
        group = values[start : start + 8]
        step = (max(group) - min(group)) / (2**bits - 1)
        for one, other, value in zip(found[start : start + 8].tolist(), naive(group, bits), group, strict=True):
            # as near as the naive code's: a value half way between two codes may fall to either
            assert abs(one - value) <= abs(other - value) + 1e-5 * max(map(abs, group)) + 1e-6
            assert abs(one - value) <= 0.51 * step + 1e-3 * max(map(abs, group)) + 1e-6


def test_a_constant_group_and_values_beyond_float16_survive() -> None:
    values = torch.tensor([[3.0] * 8, [0.0] * 8, [1e6] * 4 + [-1e6] * 4])
    found = dequantize(quantize(values, 4, 8), 4, torch.float32)
    assert torch.equal(found[:2], values[:2]) and torch.isfinite(found).all()
    assert found[2, 0] > 6e4 and found[2, 4] < -6e4


def test_more_bits_err_less() -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((dequantize(quantize(values, bits, 32), bits, torch.float32) - values).norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize(("size", "block"), [(64, 64), (96, 32), (80, 16), (8, 8)])
def test_the_hadamard_matrix_is_orthogonal_and_spreads_an_outlier(size: int, block: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-6)
    spread = torch.eye(size)[0] @ matrix
    assert torch.allclose(spread.abs().max(), torch.tensor(block**-0.5))


def test_mistakes_are_told() -> None:
    for call in (
        lambda: quantize(torch.zeros(8), 9, 8),
        lambda: quantize(torch.zeros(10), 4, 8),
        lambda: packed_bytes(4, 3),
    ):
        with pytest.raises(SmartKVError):
            call()
