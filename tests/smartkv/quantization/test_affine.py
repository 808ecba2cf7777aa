"""Codes in few bits, against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.quantization.affine import BITS, dequantize, hadamard, pack, packed_bytes, quantize, unpack
from smartkv.quantization.codecs import Adaptive, Half, Kivi, Uniform

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


def naive(values: list[float], bits: int) -> list[float]:
    """Asymmetric min-max quantisation of one group, number by number."""
    zero = float(torch.tensor(min(values)).half())
    scale = float(torch.tensor((max(values) - zero) / (2**bits - 1)).half())
    found = []
    for value in values:
        code = round((value - zero) / scale) if scale > 0 else 0
        found.append(min(max(code, 0), 2**bits - 1) * scale + zero)
    return found


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
        lambda: Adaptive(levels=(4, 2)),
        lambda: Adaptive(budget=0.0),
        lambda: Adaptive(budget=0.1).room(64),
    ):
        with pytest.raises(SmartKVError):
            call()


# -- codecs ------------------------------------------------------------------------------------------------------------


def keys_and_values(tokens: int = 64, head_dim: int = 16, batch: int = 2, heads: int = 2) -> tuple[Tensor, Tensor]:
    """Keys with an outlier channel, as real ones have."""
    random = torch.Generator().manual_seed(3)
    key = torch.randn(batch, heads, tokens, head_dim, generator=random)
    key[..., 3] = 8 + 0.3 * key[..., 3]
    return key, torch.randn(batch, heads, tokens, head_dim, generator=random)


def test_kivi_takes_keys_by_channel_and_values_by_token() -> None:
    key, value = keys_and_values()
    codec = Kivi(2, 4, group=8)
    found_key, found_value = codec.decode(codec.encode(key, value, None), torch.float32)
    for start in range(0, 64, 8):
        for channel in range(16):
            column = key[1, 0, start : start + 8, channel].tolist()
            expected = torch.tensor(naive(column, 2))
            assert torch.allclose(found_key[1, 0, start : start + 8, channel], expected, atol=1e-5)
    for token in (0, 17, 63):
        for start in (0, 8):
            expected = torch.tensor(naive(value[0, 1, token, start : start + 8].tolist(), 4))
            assert torch.allclose(found_value[0, 1, token, start : start + 8], expected, atol=1e-5)


def error(codec: object, key: Tensor, value: Tensor, importance: Tensor | None = None) -> float:
    found = codec.decode(codec.encode(key, value, importance), torch.float32)  # type: ignore[attr-defined]
    return float((found[0] - key).norm() / key.norm() + (found[1] - value).norm() / value.norm())


def test_codecs_err_in_the_order_of_their_bits() -> None:
    key, value = keys_and_values(head_dim=64)
    half, eight, four = (error(codec, key, value) for codec in (Half(), Uniform(8), Uniform(4)))
    assert half < eight < error(Adaptive(0.45), key, value) < four


@given(st.floats(0.32, 0.8), st.integers(0, 2**31))
def test_adaptive_codes_stay_within_the_budget_and_leave_less_than_an_upgrade(budget: float, seed: int) -> None:
    codec = Adaptive(budget, block=16)
    random = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, 2, 32, 16, generator=random) for _ in range(2))
    importance = torch.rand(1, 2, 32, generator=random)
    parts = codec.encode(key, value, importance)
    stored = sum(tensor.nbytes for tensor in parts.values())
    full = 2 * key.numel() * 2
    assert stored <= budget * full
    most = 2 * 16 * 16  # bytes of a block in 8 bits
    largest_step = 2 * 2 * 8  # 4 -> 8 bits of 16 channels, keys and values
    used = (2 * torch.tensor(codec.levels)[parts["level"].long()] * 16 / 8).sum(dim=-1)
    assert (used > min(codec.room(16), most) - largest_step).all()


def test_adaptive_bits_are_those_of_a_greedy_loop() -> None:
    codec = Adaptive(0.5, block=8)
    random = torch.Generator().manual_seed(0)
    error = torch.rand(5, 8, generator=random)
    chosen = codec.choose(error, 16)
    sizes = [2 * packed_bytes(16, bits) for bits in codec.levels]
    for row in range(5):
        level, left = [0] * 8, codec.room(16) - 8 * sizes[0]
        while True:
            best, gain = None, -1.0
            for token in range(8):
                if level[token] == len(sizes) - 1:
                    continue
                now, then = (codec.levels[level[token] + step] for step in (0, 1))
                cost = sizes[level[token] + 1] - sizes[level[token]]
                here = float(error[row, token]) * ((2**now - 1) ** -2 - (2**then - 1) ** -2) / cost
                if here > gain:
                    best, gain = token, here
            if best is None or sizes[level[best] + 1] - sizes[level[best]] > left:
                break
            left -= sizes[level[best] + 1] - sizes[level[best]]
            level[best] += 1
        assert chosen[row].tolist() == level


def test_important_tokens_err_less() -> None:
    key, value = keys_and_values(head_dim=64)
    codec = Adaptive(0.3)
    importance = torch.full((2, 2, 64), 1e-3)
    importance[..., ::4] = 1.0
    parts = codec.encode(key, value, importance)
    level = parts["level"].flatten(2)
    assert level[..., ::4].float().mean() > level.float().mean() + 0.5
    found, _ = codec.decode(parts, torch.float32)
    gap = (found - key).norm(dim=-1)
    assert gap[..., ::4].mean() < 0.5 * gap.mean()
