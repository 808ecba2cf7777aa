"""Affine quantisation: floats as codes of 2 to 8 bits, packed into bytes.

Neighbouring values that share a scale and a zero are a *group*. A value is stored as
`code = round((value − zero) / scale)`, where zero is the group's minimum and scale is its range divided by 2^bits − 1
(asymmetric min-max quantisation, as in KIVI, Liu et al. 2024, arXiv 2402.02750). Scale and zero are float16, and codes
are computed from these rounded figures, so the rounding adds no error beyond a code's own step.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from smartkv.errors import SmartKVError

BITS = (2, 3, 4, 5, 6, 7, 8)
SCALE_BYTES = 4  # scale and zero of one group, float16 each
LARGEST = 65504.0  # largest finite float16


class Codes(NamedTuple):
    """Quantised values.

    Attributes:
        packed: uint8 `[…, bytes]`, the codes of the last dimension.
        scale, zero: float16 `[…, groups]`.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor


def check_bits(bits: int) -> int:
    """Return `bits` if codes of that many bits are supported.

    Raises:
        SmartKVError: `bits` is not one of `BITS`.
    """
    if bits not in BITS:
        raise SmartKVError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    return bits


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes that `count` codes of `bits` bits take.

    Raises:
        SmartKVError: the codes do not fill whole bytes. Codes of 3 bits fill them eight at a time (three bytes), codes
            of 6 bits four at a time (three bytes).
    """
    whole = 8 // math.gcd(8, check_bits(bits))
    if count % whole:
        raise SmartKVError(f"codes of {bits} bits are packed {whole} at a time, got {count} codes")
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, the first code in the lowest bits.

    Args:
        codes: uint8 `[…, n]`, each below 2^bits.
        bits: of a code.

    Returns:
        uint8 `[…, n · bits / 8]`.

    Raises:
        SmartKVError: as `packed_bytes`.
    """
    packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes
    together = 8 // math.gcd(8, bits)  # the fewest codes that fill whole bytes, `stored` of them
    stored = together * bits // 8
    whole = torch.int32 if stored < 4 else torch.int64
    word = torch.zeros(*codes.shape[:-1], codes.shape[-1] // together, dtype=whole, device=codes.device)
    for place in range(together):
        word |= codes[..., place::together].to(whole) << (place * bits)
    parts = [(word >> (8 * byte)).to(torch.uint8) for byte in range(stored)]  # the conversion keeps the lowest 8 bits
    return torch.stack(parts, dim=-1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`: uint8 `[…, n · bits / 8]` -> codes uint8 `[…, n]`."""
    if check_bits(bits) == 8:
        return packed
    together = 8 // math.gcd(8, bits)
    stored = together * bits // 8
    if stored == 1:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    whole = torch.int32 if stored < 4 else torch.int64
    word = torch.zeros(*packed.shape[:-1], packed.shape[-1] // stored, dtype=whole, device=packed.device)
    for byte in range(stored):
        word |= packed[..., byte::stored].to(whole) << (8 * byte)
    places = torch.arange(0, together * bits, bits, dtype=whole, device=packed.device)
    return ((word[..., None] >> places) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def affine(values: Tensor, bits: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the codes of values that share a scale and a zero along `dim`.

    Args:
        values: floats of any shape; values beyond ±65,504, the range of float16, are clamped.
        bits: of a code.
        dim: the dimension of a group.

    Returns:
        Codes, uint8 shaped like `values`; scale and zero, float16 of size 1 along `dim`.
    """
    values = values.float().clamp(-LARGEST, LARGEST)
    least, most = values.amin(dim=dim, keepdim=True), values.amax(dim=dim, keepdim=True)
    zero = least.half()
    scale = ((most - zero.float()) / (2**bits - 1)).clamp(max=LARGEST).half()
    step = scale.float()
    codes = ((values - zero.float()) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def restored(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values that codes stand for, in `dtype`, computed in float32."""
    return (codes.float() * scale.float() + zero.float()).to(dtype)


def quantize(values: Tensor, bits: int, group: int) -> Codes:
    """Quantise `[…, n]` in groups of `group` neighbours along the last dimension.

    Returns:
        Packed codes, with scale and zero `[…, n / group]`.

    Raises:
        SmartKVError: `group` does not divide n, or as `packed_bytes`.
    """
    if group < 1 or values.shape[-1] % group:
        raise SmartKVError(f"groups of {group} do not divide {values.shape[-1]} values")
    codes, scale, zero = affine(values.unflatten(-1, (-1, group)), bits)
    return Codes(pack(codes.flatten(-2), bits), scale.squeeze(-1), zero.squeeze(-1))


def dequantize(codes: Codes, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the values that `quantize` stored, `[…, n]` in `dtype`."""
    groups = unpack(codes.packed, bits).unflatten(-1, (codes.scale.shape[-1], -1))
    return restored(groups, codes.scale[..., None], codes.zero[..., None], dtype).flatten(-2)


def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """Return an orthogonal matrix that spreads an outlier over all channels, float32 `[size, size]`.

    It is block-diagonal. Each block is Sylvester's Hadamard matrix of the largest power of two that divides `size`
    (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).
    """
    block = size & -size
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (size // block))
