"""Codecs against plain loops, their budgets, and the importance of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.quantization.affine import packed_bytes
from smartkv.quantization.codecs import SCHEMES, Adaptive, Codec, Half, Kivi, Uniform
from tests.smartkv.quantization.fixtures import naive


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


@pytest.mark.parametrize("codec", [codec for codec, _ in SCHEMES.values()], ids=list(SCHEMES))
def test_groups_that_are_appended_and_rows_that_are_selected_decode_as_before(codec: Codec) -> None:
    key, value = keys_and_values(tokens=2 * codec.block, head_dim=64)
    first, second = (
        codec.encode(key[:, :, part], value[:, :, part], None)
        for part in (slice(codec.block), slice(codec.block, None))
    )
    appended = {name: torch.cat([first[name], second[name]], dim=2) for name in first}
    whole = codec.decode(codec.encode(key, value, None), torch.float32)
    for got, want in zip(codec.decode(appended, torch.float32), whole, strict=True):
        assert torch.equal(got, want)
    rows = {name: tensor.index_select(0, torch.tensor([1, 1])) for name, tensor in appended.items()}
    for got, want in zip(codec.decode(rows, torch.float32), whole, strict=True):
        assert torch.equal(got, want[[1, 1]])


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"levels": (4, 2)}, "rising order"),
        ({"budget": 0.0}, "above 0 and at most 1"),
        ({"budget": 1.1}, "above 0 and at most 1"),
        ({"block": 0}, "at least 1"),
        ({"levels": (4, 9)}, "bits must be one of"),
    ],
)
def test_figures_out_of_range_are_refused(figures: dict[str, object], message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        Adaptive(**figures)  # type: ignore[arg-type]


def test_a_budget_too_small_for_the_fewest_bits_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(SmartKVError, match=r"give at least 0\.\d+") as refusal:
        Adaptive(budget=0.1).room(64)
    least = float(str(refusal.value).rpartition(" ")[2])
    assert Adaptive(budget=least + 0.001).room(64) >= 2 * 64 * packed_bytes(64, 2)
    with pytest.raises(SmartKVError, match="too small for 64 channels in 2 bits"):
        Adaptive(budget=least - 0.001).room(64)
