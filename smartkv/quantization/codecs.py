"""Codecs: how a quantised cache stores keys and values in few bits.

A codec encodes keys (after the rotary embedding) and values `[batch, kv_heads, tokens, head_dim]` in groups of `block`
tokens. It returns named tensors. Their first dimension is the batch, so that rows can be selected; their third runs
over tokens or groups, so that later tokens can be appended.
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

HALF_BITS = 16  # bits of a float16, the reference of all ratios
Parts = dict[str, Tensor]  # the encoded tensors, by name


@runtime_checkable
class Codec(Protocol):
    """Interface of a codec."""

    @property
    def block(self) -> int:
        """Number of tokens in a group, which is encoded as a whole."""

    def payload(self, head_dim: int) -> float:
        """Return the bits of the codes alone divided by those of float16, the ratio that papers report."""

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        """Encode whole groups of tokens.

        Args:
            key, value: `[batch, kv_heads, tokens, head_dim]`, where `tokens` is a multiple of `block`.
            importance: float32 `[batch, kv_heads, tokens]` for codecs that give important tokens more bits; others
                ignore it. None: all tokens are equally important.

        Returns:
            The encoded tensors by name.
        """

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values in `dtype`, each `[batch, kv_heads, tokens, head_dim]`."""


@dataclass(frozen=True)
class Half:
    """Keys and values in float16; values beyond ±65,504 are clamped."""

    block: int = 1

    def payload(self, head_dim: int) -> float:
        """Return the bits of the codes divided by those of float16."""
        return 1.0

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        """Encode keys and values (see `Codec.encode`)."""
        return {"key": key.clamp(-LARGEST, LARGEST).half(), "value": value.clamp(-LARGEST, LARGEST).half()}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys and values (see `Codec.decode`)."""
        return parts["key"].to(dtype), parts["value"].to(dtype)


@dataclass(frozen=True)
class Uniform:
    """Keys and values quantised token by token, each group of channels with its own scale.

    Args:
        bits: of a code, 2 to 8.
        group: channels that share a scale; their greatest common divisor with head_dim where it does not divide that.
    """

    bits: int = 8
    group: int = 32
    block: int = 1

    def payload(self, head_dim: int) -> float:
        """Return the bits of the codes divided by those of float16."""
        return self.bits / HALF_BITS

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        """Encode keys and values (see `Codec.encode`)."""
        parts: Parts = {}
        for name, tensor in (("key", key), ("value", value)):
            parts |= _named(name, quantize(tensor, self.bits, gcd(self.group, tensor.shape[-1])))
        return parts

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys and values (see `Codec.decode`)."""
        return tuple(dequantize(_codes(name, parts), self.bits, dtype) for name in ("key", "value"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Kivi:
    """KIVI: keys quantised per channel, values per token (Liu et al. 2024, arXiv 2402.02750).

    The outliers of keys stay in the same channels from token to token, so the tokens of a group share a scale in each
    channel. Values have no such channels, so a group of channels of one token shares a scale.

    Args:
        key_bits, value_bits: of a code, 2 to 8.
        group: tokens that share a scale in keys, and channels that share one in values.
    """

    key_bits: int = 2
    value_bits: int = 4
    group: int = 32

    @property
    def block(self) -> int:
        """Tokens in a group."""
        return self.group

    def payload(self, head_dim: int) -> float:
        """Return the bits of the codes divided by those of float16."""
        return (self.key_bits + self.value_bits) / 2 / HALF_BITS

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        """Encode keys and values (see `Codec.encode`)."""
        by_channel = key.unflatten(2, (-1, self.group)).transpose(-1, -2)  # [batch, kv_heads, groups, head_dim, group]
        values = quantize(value, self.value_bits, gcd(self.group, value.shape[-1]))
        return _named("key", quantize(by_channel, self.key_bits, self.group)) | _named("value", values)

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys and values (see `Codec.decode`)."""
        by_channel = dequantize(_codes("key", parts), self.key_bits, dtype)
        return by_channel.transpose(-1, -2).flatten(2, 3), dequantize(_codes("value", parts), self.value_bits, dtype)


def _named(name: str, codes: Codes) -> Parts:
    return {f"{name}_{field}": tensor for field, tensor in codes._asdict().items()}


def _codes(name: str, parts: Parts) -> Codes:
    return Codes(*(parts[f"{name}_{field}"] for field in Codes._fields))


@dataclass(frozen=True)
class Adaptive:
    """Bits by importance: within a group of tokens, important tokens get more bits of a fixed number of bytes.

    A code of b bits has a squared error of about (range / (2^b − 1))² / 12. All tokens of a group and head start with
    the fewest bits. The upgrade (2 → 3 → 4 → 8) that removes the most error per byte, weighted by importance, is made
    first, and so on until the budget is spent. A token gains less from each further upgrade, so this greedy order is
    optimal up to the last upgrade. A token's key and value get the same number of bits. The group's mean key is
    subtracted and stored, then all channels are rotated by a Hadamard matrix, which spreads outliers.

    Args:
        budget: stored bytes divided by those of float16, everything included: codes, scales, zeros, means, and the
            number of bits of each token.
        block: tokens in a group, which share a budget.
        levels: numbers of bits to choose from, in rising order.

    Raises:
        SmartKVError: levels that do not rise, or a budget or group size out of range.
    """

    budget: float = 0.5
    block: int = 64
    levels: tuple[int, ...] = (2, 3, 4, 8)

    def __post_init__(self) -> None:
        if not self.levels or list(self.levels) != sorted(set(map(check_bits, self.levels))):
            raise SmartKVError(f"levels must be numbers of bits in rising order, got {self.levels}")
        if not 0 < self.budget <= 1 or self.block < 1:
            raise SmartKVError(
                f"budget must be above 0 and at most 1, and block at least 1, got {self.budget} and {self.block}"
            )

    def payload(self, head_dim: int) -> float:
        """Return the bits of the codes divided by those of float16."""
        return self.room(head_dim) / (2 * head_dim * self.block * HALF_BITS / 8)

    def room(self, head_dim: int) -> int:
        """Return the bytes for the codes of a group and head, at most what the highest level takes.

        Raises:
            SmartKVError: the budget is too small for the lowest level.
        """
        fixed = self.block * (2 * SCALE_BYTES + 1) + 2 * head_dim  # scales and zeros, level of each token, mean key
        room = int(self.budget * 2 * head_dim * self.block * HALF_BITS / 8) - fixed
        least, most = (2 * self.block * packed_bytes(head_dim, self.levels[n]) for n in (0, -1))
        if room < least:
            raise SmartKVError(
                f"a budget of {self.budget:g} is too small for {head_dim} channels in {self.levels[0]} bits: "
                f"give at least {(least + fixed) / (4 * head_dim * self.block):.3f}"
            )
        return min(room, most)

    def choose(self, error: Tensor, head_dim: int) -> Tensor:
        """Choose the number of bits of each token.

        Args:
            error: float32 `[…, block]`, importance × squared range of each token.
            head_dim: channels.

        Returns:
            Index into `levels`, int64 shaped like `error`.
        """
        sizes = [2 * packed_bytes(head_dim, bits) for bits in self.levels]
        chosen = torch.zeros(error.shape, dtype=torch.int64, device=error.device)
        if len(sizes) == 1:
            return chosen
        costs = torch.tensor([b - a for a, b in pairwise(sizes)], device=error.device)
        squares = [(2**bits - 1) ** -2.0 for bits in self.levels]
        gains = torch.tensor([a - b for a, b in pairwise(squares)], device=error.device)
        gain = (error[..., None] * (gains / costs)).flatten(-2)  # in the order (token, upgrade)
        order = gain.argsort(dim=-1, descending=True, stable=True)
        spent = costs.repeat(error.shape[-1])[order].cumsum(dim=-1)
        taken = spent <= self.room(head_dim) - self.block * sizes[0]
        # a token's upgrade counts only if its earlier ones do, also where gains are equal or zero
        upgraded = torch.zeros_like(taken).scatter_(-1, order, taken).unflatten(-1, (-1, len(costs)))
        return chosen + upgraded.long().cumprod(dim=-1).sum(dim=-1)

    def encode(self, key: Tensor, value: Tensor, importance: Tensor | None) -> Parts:
        """Encode keys and values (see `Codec.encode`)."""
        head_dim = key.shape[-1]
        rotation = hadamard(head_dim, key.device)
        groups = [tensor.float().unflatten(2, (-1, self.block)) for tensor in (key, value)]
        mean = groups[0].mean(dim=3, keepdim=True).clamp(-LARGEST, LARGEST).half()
        both = torch.stack(
            [(groups[0] - mean.float()) @ rotation, groups[1] @ rotation], dim=4
        )  # [b, h, groups, block, 2, d]
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
        """Return where each token's codes start in the flat payload, int64 `[batch, kv_heads, groups, block]`."""
        sizes = torch.tensor([2 * packed_bytes(head_dim, bits) for bits in self.levels], device=level.device)
        size = sizes[level.long()]
        first = torch.arange(level[..., 0].numel(), device=level.device).view(level.shape[:-1]) * self.room(head_dim)
        return first[..., None] + size.cumsum(dim=-1) - size

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys and values (see `Codec.decode`)."""
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
# each scheme's codec, and how many of the latest tokens stay in the model's dtype (KIVI's paper keeps 128)
SCHEMES: dict[str, tuple[Codec, int]] = {
    "fp16": (Half(), 0),
    "int8": (Uniform(8), 0),
    "int4": (Uniform(4), 0),
    "kivi": (Kivi(2, 4), 128),
    "kivi2": (Kivi(2, 2), 128),
    "kivi4": (Kivi(4, 4), 128),
    "adaptive": (Adaptive(0.5), 64),
}
