"""Keys of heads of unequal length, one head after another in flat tensors."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Fields(NamedTuple):
    """What is stored of keys; `…` is one shape for all, such as `[keys]` or `[pairs, keys]`.

    Attributes:
        key, value: `[…, head_dim]`, the model's dtype; or packed, uint8 `[…, row bytes]` (see
            `smartkv.quantization.per_token`).
        position: int32 `[…]`, place among the real tokens of the row; `HOLE`: no key.
        expiry: int32 `[…]`, the first position whose query does not see the key.
        score: float32 `[…]`, the prediction that breaks ties under a cap for a whole layer; None: not needed.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    expiry: Tensor
    score: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Fields":
        """`change` applied to every tensor."""
        key, value, position, expiry = (change(tensor) for tensor in self[:4])
        return Fields(key, value, position, expiry, None if self.score is None else change(self.score))

    def at(self, index: Tensor) -> "Fields":
        """`tensor[index]` of every tensor."""
        if index.dim() == 1 and index.dtype == torch.int64:  # the same, copied row by row
            return self.map(lambda tensor: tensor.index_select(0, index))
        return self.map(lambda tensor: tensor[index])

    def row(self, index: int, stop: int | None = None) -> "Fields":
        """`tensor[index]`, or `tensor[index:stop]`, of every tensor: no copy."""
        return self.map(lambda tensor: tensor[index] if stop is None else tensor[index:stop])

    def split(self, sizes: list[int]) -> list["Fields"]:
        """Parts of so many keys each, one after another: no copy."""
        stops = list(itertools.accumulate(sizes))
        return [self.row(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

    @staticmethod
    def cat(parts: Sequence["Fields"], dim: int = 0) -> "Fields":
        """All parts, one after the other."""
        key, value, position, expiry = (torch.cat([part[n] for part in parts], dim=dim) for n in range(4))  # type: ignore[misc]
        scores = [part.score for part in parts if part.score is not None]
        return Fields(key, value, position, expiry, torch.cat(scores, dim=dim) if scores else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind all tensors."""
        return storage_bytes(self)


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind tensors (None counts nothing)."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def ranks(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of `total` keys that lie pair by pair, `counts` `[pairs]` each: their pair and place in it, int64 `[total]`."""
    pair = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return pair, torch.arange(total, device=counts.device) - first[pair]


@dataclass
class Ragged:
    """Keys of all pairs, one after another and in the order of their positions.

    Attributes:
        fields: `[keys]`.
        counts: int64 `[pairs]`, keys of each pair; their sum is `keys`.
    """

    fields: Fields
    counts: Tensor

    @cached_property
    def sizes(self) -> list[int]:
        """`counts`, which are never changed: a GPU is waited for once."""
        return self.counts.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        return self.fields.nbytes + storage_bytes([self.counts])

    @property
    def slots(self) -> Tensor:
        """Slots of each pair, int64 `[pairs]`: there are no holes."""
        return self.counts

    def live(self, _: int = 0) -> Tensor:
        """Keys of each pair, int64 `[pairs]`."""
        return self.counts

    def by_pair(self) -> list[Fields]:
        """The keys of each pair: no copy."""
        return self.fields.split(self.sizes)

    def pair(self) -> Tensor:
        """The pair of each key, int64 `[keys]`."""
        return ranks(self.counts, len(self.fields.position))[0]

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Where the keys of pairs lie, one pair a line: int64 `[pairs, longest]`, and bool of what is a key there."""
        first = self.counts.cumsum(0) - self.counts
        place = torch.arange(max(self.sizes), device=self.counts.device)
        filled = place < self.counts[:, None]
        return torch.where(filled, first[:, None] + place, 0), filled

    def select(self, pairs: Tensor) -> "Ragged":
        """Go on with these pairs, int64 `[chosen]`; any may come twice."""
        counts = self.counts[pairs]
        pair, rank = ranks(counts, int(counts.sum()))
        index = (self.counts.cumsum(0) - self.counts)[pairs][pair] + rank
        return Ragged(self.fields.at(index), counts)
