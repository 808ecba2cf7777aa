"""Keys and values of a cache that evicts, in few bits: each a row of bytes of its own, so that any of them can go.

KIVI takes keys by channel, many tokens together: their outliers stay in the same channels. Rows of single tokens reach
nearly the same error if what all keys of a head have in common is taken off first, and what is left is turned by a
Hadamard matrix, which spreads outliers over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). Neither has
to be undone: a constant on all keys of a head changes no softmax, and queries are turned alike; the output is turned
back once.
"""

import torch
from torch import Tensor

from smartkv.quantization import SCALE_BYTES, Codes, check_bits, dequantize, hadamard, packed_bytes, quantize

SINKS = 4  # tokens at the start whose keys are unlike all others
ENOUGH = 32  # tokens from which a head's mean key is taken


class PackedRows:
    """How one layer packs.

    Args:
        bits: of a code, 2, 3, 4 or 8.

    Attributes:
        centre: float32 `[pairs, head_dim]`, taken off each key of a pair; None: nothing was packed yet.

    Raises:
        SmartKVError: other bits.
    """

    def __init__(self, bits: int) -> None:
        self.bits = check_bits(bits)
        self.centre: Tensor | None = None

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one key, or one value: codes, scale and zero.

        Raises:
            SmartKVError: `head_dim` codes do not fill whole bytes.
        """
        return packed_bytes(head_dim, self.bits) + SCALE_BYTES

    def head_dim(self, row_bytes: int) -> int:
        """The inverse of `row_bytes`."""
        return (row_bytes - SCALE_BYTES) * 8 // self.bits

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
        return self._packed(key.float() - centre)

    def pack_values(self, value: Tensor) -> Tensor:
        """`[…, head_dim]` -> uint8 `[…, row_bytes]`, turned."""
        return self._packed(value.float())

    def _packed(self, tensor: Tensor) -> Tensor:
        codes = quantize(tensor @ hadamard(tensor.shape[-1], tensor.device), self.bits, tensor.shape[-1])
        scales = torch.cat([codes.scale, codes.zero], dim=-1).view(torch.uint8)
        return torch.cat([codes.packed, scales], dim=-1)

    def read(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys or values as they were packed, turned (and centred): `[…, head_dim]`."""
        scale, zero = rows[..., -SCALE_BYTES:].contiguous().view(torch.float16).split(1, dim=-1)
        return dequantize(Codes(rows[..., :-SCALE_BYTES], scale, zero), self.bits, dtype)

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
