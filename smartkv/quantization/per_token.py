"""Keys and values of a cache that evicts, in few bits: each a row of bytes of its own, so that any of them can go.

KIVI takes keys by channel, many tokens together: their outliers stay in the same channels. Rows of single tokens reach
nearly the same error if what all keys of a head have in common is taken off first, and what is left is turned by a
Hadamard matrix, which spreads outliers over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). Neither has
to be undone: a constant on all keys of a head changes no softmax, and queries are turned alike; the output is turned
back once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.quantization.affine import SCALE_BYTES, Codes, check_bits, dequantize, hadamard, packed_bytes, quantize

SINKS = 4  # tokens at the start whose keys are unlike all others
ENOUGH = 32  # tokens from which a head's mean key is taken
Bits = int | Sequence[int]


class PackedRows:
    """How one layer packs.

    Args:
        bits: of a code, 2 to 8; or those of keys and those of values. Keys want more: what is wrong with a key is wrong
            with the weight of its value, and is multiplied by the query first.

    Attributes:
        centre: float32 `[pairs, head_dim]`, taken off each key of a pair; None: nothing was packed yet.

    Raises:
        SmartKVError: other bits.
    """

    def __init__(self, bits: Bits) -> None:
        self.key_bits, self.value_bits = (check_bits(each) for each in key_and_value(bits))
        self.centre: Tensor | None = None

    def row_bytes(self, head_dim: int) -> tuple[int, int]:
        """Bytes of one key and of one value: codes, scale and zero.

        Raises:
            SmartKVError: `head_dim` codes do not fill whole bytes.
        """
        key, value = (packed_bytes(head_dim, bits) + SCALE_BYTES for bits in (self.key_bits, self.value_bits))
        return key, value

    def head_dim(self, key_bytes: int) -> int:
        """Channels of a head whose keys take so many bytes."""
        return (key_bytes - SCALE_BYTES) * 8 // self.key_bits

    def begin(self, key: Tensor, real: Tensor | None) -> None:
        """Take the centre from the first keys, `[pairs, tokens, head_dim]`; `real` bool `[pairs, tokens]` or None.

        Few tokens give no good mean: then nothing is taken off.
        """
        counted = key.new_ones(key.shape[:2], dtype=torch.bool) if real is None else real
        counted = counted & (counted.cumsum(dim=1) > SINKS)
        weight = counted[..., None].float()
        enough = weight.sum(dim=1) >= ENOUGH
        mean = (key.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        self.centre = mean * enough

    def enter(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries turned, keys and values packed.

        Args:
            query: `[…, head_dim]`.
            key, value: `[pairs, tokens, head_dim]`.
            padding: bool `[pairs, tokens]`; None: there is none.
        """
        if self.centre is None:
            self.begin(key, None if padding is None else ~padding)
        return self.turn(query), self.pack_keys(key), self.pack_values(value)

    def pack_keys(self, key: Tensor) -> Tensor:
        """`[pairs, …, head_dim]` -> uint8 `[pairs, …, row_bytes]`, turned and centred."""
        if self.centre is None:
            raise RuntimeError("begin with the first keys")
        centre = self.centre.view(len(key), *[1] * (key.dim() - 2), -1)
        return _packed(key.float() - centre, self.key_bits)

    def pack_values(self, value: Tensor) -> Tensor:
        """`[…, head_dim]` -> uint8 `[…, row_bytes]`, turned."""
        return _packed(value.float(), self.value_bits)

    def read(self, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (turned and centred) and values (turned) as they were packed: `[…, row bytes]` -> `[…, head_dim]`."""
        return _read(key, self.key_bits, dtype), _read(value, self.value_bits, dtype)

    @staticmethod
    def turn(query: Tensor) -> Tensor:
        """Queries for such keys, `[…, head_dim]`, the same dtype."""
        return (query.float() @ hadamard(query.shape[-1], query.device)).to(query.dtype)

    @staticmethod
    def turn_back(output: Tensor) -> Tensor:
        """What attention over such values gives, as it would be without."""
        return (output.float() @ hadamard(output.shape[-1], output.device).T).to(output.dtype)

    def select(self, pairs: Tensor) -> None:
        """Go on with these pairs, int64 `[pairs]`."""
        self.centre = None if self.centre is None else self.centre.index_select(0, pairs)


def key_and_value(bits: Bits) -> tuple[int, int]:
    """Return the bits of keys and those of values.

    Raises:
        SmartKVError: neither a whole number nor two of them.
    """
    pair = (bits, bits) if isinstance(bits, int) else bits
    if not isinstance(pair, tuple | list) or len(pair) != 2 or any(type(each) is not int for each in pair):
        raise SmartKVError(
            f"bits must be a whole number, or one for keys and one for values as in (6, 4), got {bits!r}"
        )
    return pair[0], pair[1]


def _packed(tensor: Tensor, bits: int) -> Tensor:
    codes = quantize(tensor @ hadamard(tensor.shape[-1], tensor.device), bits, tensor.shape[-1])
    scales = torch.cat([codes.scale, codes.zero], dim=-1).view(torch.uint8)
    return torch.cat([codes.packed, scales], dim=-1)


def _read(rows: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    scale, zero = rows[..., -SCALE_BYTES:].contiguous().view(torch.float16).split(1, dim=-1)
    return dequantize(Codes(rows[..., :-SCALE_BYTES], scale, zero), bits, dtype)
