"""How a quantised cache stores keys and values: what goes into bytes, and what comes out.

Keys are those after the rotary embedding. A codec takes whole blocks of tokens, `[batch, kv_heads, tokens, head_dim]`,
and gives named tensors whose third dimension runs along tokens or blocks, so that what comes later is appended, and
whose first is the batch, so that its rows can be chosen.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.quantization.affine import (
    LARGEST,
    SCALE_BYTES,
    Codes,
    affine,
    check_bits,
    dequantize,
    hadamard,
    pack,
    packed_bytes,
    quantize,
    restored,
    unpack,
)

HALF_BITS = 16  # of float16, which ratios are given of
Parts = dict[str, Tensor]


@runtime_checkable
class Codec(Protocol):
    """Attributes: `block`: tokens that are stored together."""

    @property
    def block(self) -> int: ...

    def payload(self, head_dim: int) -> float:
        """Bits of the codes alone over those of float16: the ratio that papers name."""

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        """Whole blocks.

        Args:
            key, value: `[batch, kv_heads, tokens, head_dim]`, a multiple of `block` tokens.
            importance: float32 `[batch, kv_heads, tokens]`, for codecs that ask for it.
        """

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, `[batch, kv_heads, tokens, head_dim]`."""


@dataclass(frozen=True)
class Half:
    """float16 (values beyond ±65,504 are cut there)."""

    block: int = 1

    def payload(self, head_dim: int) -> float:
        return 1.0

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        return {"key": key.clamp(-LARGEST, LARGEST).half(), "value": value.clamp(-LARGEST, LARGEST).half()}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return parts["key"].to(dtype), parts["value"].to(dtype)


@dataclass(frozen=True)
class Uniform:
    """Keys and values token by token, each `group` channels with a scale of their own.

    Args:
        bits: 2, 3, 4 or 8.
        group: channels; fewer where they do not divide the head's.
    """

    bits: int = 8
    group: int = 32
    block: int = 1

    def payload(self, head_dim: int) -> float:
        return self.bits / HALF_BITS

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        parts: Parts = {}
        for name, tensor in (("key", key), ("value", value)):
            parts |= _named(name, quantize(tensor, self.bits, gcd(self.group, tensor.shape[-1])))
        return parts

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return tuple(dequantize(_codes(name, parts), self.bits, dtype) for name in ("key", "value"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Kivi:
    """Keys by channel, `group` tokens together; values by token, `group` channels together (Liu et al. 2024, arXiv
    2402.02750). Channels of keys have outliers that stay the same from token to token; those of values have none.

    Args:
        key_bits, value_bits: 2, 3, 4 or 8.
        group: tokens, and channels.
    """

    key_bits: int = 2
    value_bits: int = 4
    group: int = 32

    @property
    def block(self) -> int:
        return self.group

    def payload(self, head_dim: int) -> float:
        return (self.key_bits + self.value_bits) / 2 / HALF_BITS

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        by_channel = key.unflatten(2, (-1, self.group)).transpose(-1, -2)  # [batch, kv_heads, blocks, head_dim, group]
        values = quantize(value, self.value_bits, gcd(self.group, value.shape[-1]))
        return _named("key", quantize(by_channel, self.key_bits, self.group)) | _named("value", values)

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        by_channel = dequantize(_codes("key", parts), self.key_bits, dtype)
        return by_channel.transpose(-1, -2).flatten(2, 3), dequantize(_codes("value", parts), self.value_bits, dtype)


def _named(name: str, codes: Codes) -> Parts:
    return {f"{name}_{field}": tensor for field, tensor in codes._asdict().items()}


def _codes(name: str, parts: Parts) -> Codes:
    return Codes(*(parts[f"{name}_{field}"] for field in Codes._fields))


@dataclass(frozen=True)
class Adaptive:
    """Bits by importance: of each block and head, tokens that matter more get more of a fixed budget of bytes.

    A code of b bits has a squared error of about (range / (2^b − 1))² / 12. All tokens start with the fewest bits; the
    upgrade (2 → 3 → 4 → 8) that takes most error, weighted by importance, off for each byte comes first, until the
    budget is spent. Each token's gain falls from upgrade to upgrade, so this greedy order is the best there is up to
    the last upgrade. Keys and values get the same bits. Channels are turned by a Hadamard matrix, which spreads
    outliers; keys have their block's mean taken off first, which is stored.

    Args:
        budget: bytes over those of float16, all included: scales, zeros, means, and which token has how many bits.
        block: tokens that share a budget.
        levels: bits to choose from.
    """

    budget: float = 0.5
    block: int = 64
    levels: tuple[int, ...] = (2, 3, 4, 8)

    def __post_init__(self) -> None:
        if not self.levels or list(self.levels) != sorted(set(map(check_bits, self.levels))):
            raise SmartKVError(f"levels must be bits in rising order, got {self.levels}")
        if not 0 < self.budget <= 1 or self.block < 1:
            raise SmartKVError(
                f"budget must be above 0 and at most 1, block 1 or more, got {self.budget}, {self.block}"
            )

    def payload(self, head_dim: int) -> float:
        return self.room(head_dim) / (2 * head_dim * self.block * HALF_BITS / 8)

    def room(self, head_dim: int) -> int:
        """Bytes for a block's codes.

        Raises:
            SmartKVError: the budget is too small for the fewest bits, or larger than the most take.
        """
        fixed = self.block * (2 * SCALE_BYTES + 1) + 2 * head_dim  # scales and zeros, bits of each token, mean key
        room = int(self.budget * 2 * head_dim * self.block * HALF_BITS / 8) - fixed
        least, most = (2 * self.block * packed_bytes(head_dim, self.levels[n]) for n in (0, -1))
        if room < least:
            raise SmartKVError(
                f"a budget of {self.budget:g} is too little for {head_dim} channels in {self.levels[0]} bits: "
                f"give at least {(least + fixed) / (4 * head_dim * self.block):.3f}"
            )
        return min(room, most)

    def choose(self, error: Tensor, head_dim: int) -> Tensor:
        """Index into `levels` of each token, int64 like `error`.

        Args:
            error: float32 `[…, block]`, importance × squared range.
        """
        sizes = [2 * packed_bytes(head_dim, bits) for bits in self.levels]
        chosen = torch.zeros(error.shape, dtype=torch.int64, device=error.device)
        if len(sizes) == 1:
            return chosen
        costs = torch.tensor([b - a for a, b in pairwise(sizes)], device=error.device)
        squares = [(2**bits - 1) ** -2.0 for bits in self.levels]
        gains = torch.tensor([a - b for a, b in pairwise(squares)], device=error.device)
        gain = (error[..., None] * (gains / costs)).flatten(-2)  # token by token, upgrade by upgrade
        order = gain.argsort(dim=-1, descending=True, stable=True)
        spent = costs.repeat(error.shape[-1])[order].cumsum(dim=-1)
        taken = spent <= self.room(head_dim) - self.block * sizes[0]
        # an upgrade counts only after the one before it, also where gains are equal or zero
        got = torch.zeros_like(taken).scatter_(-1, order, taken).unflatten(-1, (-1, len(costs)))
        return chosen + got.long().cumprod(dim=-1).sum(dim=-1)

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        head_dim = key.shape[-1]
        turn = hadamard(head_dim, key.device)
        blocks = [tensor.float().unflatten(2, (-1, self.block)) for tensor in (key, value)]
        mean = blocks[0].mean(dim=3, keepdim=True).clamp(-LARGEST, LARGEST).half()
        both = torch.stack([(blocks[0] - mean.float()) @ turn, blocks[1] @ turn], dim=4)  # [b, h, blocks, block, 2, d]
        spread = (both.amax(dim=-1) - both.amin(dim=-1)).square().sum(dim=-1)
        weight = 1.0 if importance is None else importance.float().unflatten(2, (-1, self.block)).clamp(min=1e-9)
        level = self.choose(spread * weight, head_dim)
        payload = both.new_zeros(*level.shape[:3], self.room(head_dim), dtype=torch.uint8)
        scales = both.new_zeros(*level.shape, 2, 2, dtype=torch.float16)
        start = self._starts(level, head_dim)
        for number, bits in enumerate(self.levels):
            here = level == number
            codes, scale, zero = affine(both[here], bits)  # [tokens, 2, head_dim]
            index = start[here][:, None] + torch.arange(2 * packed_bytes(head_dim, bits), device=key.device)
            payload.view(-1)[index] = pack(codes, bits).flatten(1)
            scales[here] = torch.cat([scale, zero], dim=-1)
        return {"payload": payload, "level": level.to(torch.uint8), "scales": scales, "mean": mean}

    def _starts(self, level: Tensor, head_dim: int) -> Tensor:
        """Where each token's codes start in the bytes of all blocks, int64 `[batch, kv_heads, blocks, block]`."""
        sizes = torch.tensor([2 * packed_bytes(head_dim, bits) for bits in self.levels], device=level.device)
        size = sizes[level.long()]
        first = torch.arange(level[..., 0].numel(), device=level.device).view(level.shape[:-1]) * self.room(head_dim)
        return first[..., None] + size.cumsum(dim=-1) - size

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        level, mean = parts["level"].long(), parts["mean"]
        head_dim = mean.shape[-1]
        start = self._starts(level, head_dim)
        both = mean.new_empty(*level.shape, 2, head_dim, dtype=torch.float32)
        for number, bits in enumerate(self.levels):
            here = level == number
            size = packed_bytes(head_dim, bits)
            index = start[here][:, None] + torch.arange(2 * size, device=level.device)
            codes = unpack(parts["payload"].reshape(-1)[index].unflatten(1, (2, size)), bits)
            scale, zero = parts["scales"][here].split(1, dim=-1)
            both[here] = restored(codes, scale, zero, torch.float32)
        key, value = (both @ hadamard(head_dim, level.device).T).unbind(dim=4)
        return (key + mean.float()).flatten(2, 3).to(dtype), value.flatten(2, 3).to(dtype)


Scheme = Literal["fp16", "int8", "int4", "kivi", "kivi2", "kivi4", "adaptive"]
# codec, and the latest tokens that stay in the model's own dtype (KIVI's paper keeps 128)
SCHEMES: dict[str, tuple[Codec, int]] = {
    "fp16": (Half(), 0),
    "int8": (Uniform(8), 0),
    "int4": (Uniform(4), 0),
    "kivi": (Kivi(2, 4), 128),
    "kivi2": (Kivi(2, 2), 128),
    "kivi4": (Kivi(4, 4), 128),
    "adaptive": (Adaptive(0.5), 64),
}
