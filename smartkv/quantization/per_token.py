"""Keys and values of an evicting cache in few bits: one row of bytes per token, so that any token can be freed.

KIVI quantises keys per channel, many tokens together, because the outliers of keys stay in the same channels. Rows of
single tokens come close to its error in two steps. First the mean key of a head, its *centre*, is subtracted. Then the
channels are rotated by a Hadamard matrix, which spreads outliers over all of them (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456). Neither step has to be undone for keys: a constant added to all keys of a head changes no softmax, and
queries are rotated alike. (A softmax with a cap or learned sinks does change: its keys get the centre back.) The output
of attention over rotated values is rotated back once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.quantization.affine import SCALE_BYTES, Codes, check_bits, dequantize, hadamard, packed_bytes, quantize

SINKS = 4  # first tokens, whose keys are unlike all others and are left out of the centre
MIN_CENTRE_TOKENS = 32  # fewer tokens than this give no good centre
Bits = int | Sequence[int]


class PackedRows:
    """Packs the keys and values of one layer.

    Args:
        bits: of a code, 2 to 8, or two figures for keys and values. Keys need more: an error in a key is multiplied by
            the query and changes the weight of the whole value.

    Attributes:
        centre: float32 `[pairs, head_dim]`, subtracted from each key of a pair (a row of the batch and a KV head); None
            before the first keys are packed.

    Raises:
        SmartKVError: bits that are not supported.
    """

    def __init__(self, bits: Bits) -> None:
        self.key_bits, self.value_bits = (check_bits(each) for each in key_and_value(bits))
        self.centre: Tensor | None = None

    def row_bytes(self, head_dim: int) -> tuple[int, int]:
        """Return the bytes of one key and of one value: codes, scale and zero.

        Raises:
            SmartKVError: `head_dim` codes do not fill whole bytes.
        """
        key, value = (packed_bytes(head_dim, bits) + SCALE_BYTES for bits in (self.key_bits, self.value_bits))
        return key, value

    def head_dim(self, key_bytes: int) -> int:
        """Return the channels of a head whose packed key takes `key_bytes`."""
        return (key_bytes - SCALE_BYTES) * 8 // self.key_bits

    def fit_centre(self, key: Tensor, real: Tensor | None) -> None:
        """Set the centre to the mean of a pair's first keys, sinks left out; to zero where these are too few.

        Args:
            key: `[pairs, tokens, head_dim]`.
            real: bool `[pairs, tokens]`, False for padding; None: no padding.
        """
        counted = key.new_ones(key.shape[:2], dtype=torch.bool) if real is None else real
        counted = counted & (counted.cumsum(dim=1) > SINKS)
        weight = counted[..., None].float()
        enough = weight.sum(dim=1) >= MIN_CENTRE_TOKENS
        mean = (key.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        self.centre = mean * enough

    def encode(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries, and pack keys and values; the first call also sets the centre.

        Args:
            query: `[…, head_dim]`.
            key, value: `[pairs, tokens, head_dim]`.
            padding: bool `[pairs, tokens]`, True for padding; None: no padding.

        Returns:
            Rotated queries; packed keys and packed values, uint8 `[pairs, tokens, row bytes]`.
        """
        if self.centre is None:
            self.fit_centre(key, None if padding is None else ~padding)
        return self.rotate(query), self.pack_keys(key), self.pack_values(value)

    def pack_keys(self, key: Tensor) -> Tensor:
        """Centre, rotate and pack keys: `[pairs, …, head_dim]` -> uint8 `[pairs, …, row bytes]`."""
        if self.centre is None:
            raise RuntimeError("call fit_centre with the first keys before pack_keys")
        centre = self.centre.view(len(key), *[1] * (key.dim() - 2), -1)
        return _pack_rows(key.float() - centre, self.key_bits)

    def pack_values(self, value: Tensor) -> Tensor:
        """Rotate and pack values: `[…, head_dim]` -> uint8 `[…, row bytes]`."""
        return _pack_rows(value.float(), self.value_bits)

    def decode(
        self, key: Tensor, value: Tensor, dtype: torch.dtype, pairs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unpack keys and values, which stay rotated.

        Args:
            key, value: packed, uint8 `[entries, tokens, row bytes]`.
            dtype: of the result.
            pairs: int64 `[entries]`, the pair of each entry, whose centre is added to its keys again. A softmax that is
                not plain needs it. None: keys stay centred.

        Returns:
            Keys and values, `[entries, tokens, head_dim]`.
        """
        keys, values = _unpack_rows(key, self.key_bits, dtype), _unpack_rows(value, self.value_bits, dtype)
        if pairs is not None and self.centre is not None:
            keys = keys + self.rotate(self.centre)[pairs, None].to(dtype)
        return keys, values

    @staticmethod
    def rotate(query: Tensor) -> Tensor:
        """Rotate queries as packed keys are, `[…, head_dim]` in the same dtype."""
        return (query.float() @ hadamard(query.shape[-1], query.device)).to(query.dtype)

    @staticmethod
    def rotate_back(output: Tensor) -> Tensor:
        """Undo the rotation of values in the output of attention, `[…, head_dim]` in the same dtype."""
        return (output.float() @ hadamard(output.shape[-1], output.device).T).to(output.dtype)

    def select(self, pairs: Tensor) -> None:
        """Keep the centres of these pairs, int64 `[selected]`."""
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


def _pack_rows(tensor: Tensor, bits: int) -> Tensor:
    codes = quantize(tensor @ hadamard(tensor.shape[-1], tensor.device), bits, tensor.shape[-1])
    scales = torch.cat([codes.scale, codes.zero], dim=-1).view(torch.uint8)
    return torch.cat([codes.packed, scales], dim=-1)


def _unpack_rows(rows: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    scale, zero = rows[..., -SCALE_BYTES:].contiguous().view(torch.float16).split(1, dim=-1)
    return dequantize(Codes(rows[..., :-SCALE_BYTES], scale, zero), bits, dtype)
