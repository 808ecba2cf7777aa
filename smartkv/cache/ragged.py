"""Ragged storage: the keys of heads of unequal length, one head after another in flat tensors.

A *pair* is one row of the batch and one KV head, in the order (row, head).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Fields(NamedTuple):
    """The stored tensors of some keys; `…` is one shape for all of them, such as `[keys]` or `[pairs, keys]`.

    Attributes:
        key, value: `[…, head_dim]` in the model's dtype; or packed, uint8 `[…, row bytes]` (see
            `smartkv.quantization.per_token`).
        position: int32 `[…]`, index among the real tokens of the row; `HOLE` where there is no key.
        expiry: int32 `[…]`, first position whose query does not see the key.
        score: float32 `[…]`, the prediction that breaks ties under a cap shared by a layer; or float16 `[…, ages]`,
            what the key is worth at each age under a floating price; None: neither.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    expiry: Tensor
    score: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Fields":
        """Apply `change` to every tensor."""
        key, value, position, expiry = (change(tensor) for tensor in self[:4])
        return Fields(key, value, position, expiry, None if self.score is None else change(self.score))

    def at(self, index: Tensor) -> "Fields":
        """Return `tensor[index]` of every tensor."""
        if index.dim() == 1 and index.dtype == torch.int64:  # the same result, copied row by row
            return self.map(lambda tensor: tensor.index_select(0, index))
        return self.map(lambda tensor: tensor[index])

    def put(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values `[pairs, tokens, head_dim]`, or packed, in slots int64 `[tokens, pairs]`."""
        flat = slots.flatten()
        self.key.index_copy_(0, flat, key.transpose(0, 1).flatten(0, 1))
        self.value.index_copy_(0, flat, value.transpose(0, 1).flatten(0, 1))

    def judge(self, slots: Tensor, expiry: Tensor, score: Tensor | None) -> None:
        """Store the decision about the keys in some slots.

        Args:
            slots: int64 `[pairs, tokens]`.
            expiry: int64, like `slots`.
            score: float32, like `slots`, or None: no score is stored.
        """
        self.expiry[slots] = expiry.int()
        if self.score is not None and score is not None:
            self.score[slots] = score

    def row(self, index: int, stop: int | None = None) -> "Fields":
        """Return views `tensor[index]`, or `tensor[index:stop]`, of every tensor."""
        return self.map(lambda tensor: tensor[index] if stop is None else tensor[index:stop])

    def split(self, sizes: list[int]) -> list["Fields"]:
        """Return views of consecutive parts of `sizes` keys each."""
        stops = list(itertools.accumulate(sizes))
        return [self.row(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

    @staticmethod
    def cat(parts: Sequence["Fields"], dim: int = 0) -> "Fields":
        """Concatenate all parts along `dim`."""
        key, value, position, expiry = (torch.cat([part[n] for part in parts], dim=dim) for n in range(4))  # type: ignore[misc]
        scores = [part.score for part in parts if part.score is not None]
        return Fields(key, value, position, expiry, torch.cat(scores, dim=dim) if scores else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind all tensors."""
        return storage_bytes(self)


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the storages behind tensors; None counts as 0."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def ranks(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the pair of each key, and its place within the pair, when keys lie pair by pair.

    Args:
        counts: int64 `[pairs]`, keys of each pair.
        total: their sum.

    Returns:
        Two tensors int64 `[total]`.
    """
    pair = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return pair, torch.arange(total, device=counts.device) - first[pair]


@dataclass
class Ragged:
    """The keys of all pairs, pair by pair, in the order of their positions.

    Attributes:
        fields: the stored tensors, `[keys]`.
        counts: int64 `[pairs]`, keys of each pair; their sum is `keys`.
    """

    fields: Fields
    counts: Tensor

    @cached_property
    def sizes(self) -> list[int]:
        """`counts` as a list, read once (`counts` never change), because reading waits for the GPU."""
        return self.counts.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        return self.fields.nbytes + storage_bytes([self.counts])

    @property
    def slots(self) -> Tensor:
        """Slots of each pair, int64 `[pairs]`; each holds a key."""
        return self.counts

    def live(self, _: int = 0) -> Tensor:
        """Return the keys of each pair, int64 `[pairs]`; the argument is that of `Pages.live`."""
        return self.counts

    def by_pair(self) -> list[Fields]:
        """Return views of the keys of each pair."""
        return self.fields.split(self.sizes)

    def pair(self) -> Tensor:
        """Return the pair of each key, int64 `[keys]`."""
        return ranks(self.counts, len(self.fields.position))[0]

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Return the indices of each pair's keys as a padded table.

        Returns:
            Indices into `fields`, int64 `[pairs, longest]`; and a bool mask of the same shape, False for padding.
        """
        first = self.counts.cumsum(0) - self.counts
        place = torch.arange(max(self.sizes), device=self.counts.device)
        filled = place < self.counts[:, None]
        return torch.where(filled, first[:, None] + place, 0), filled

    def select(self, pairs: Tensor) -> "Ragged":
        """Return the storage of these pairs, int64 `[selected]`, which may repeat."""
        counts = self.counts[pairs]
        pair, rank = ranks(counts, int(counts.sum()))
        index = (self.counts.cumsum(0) - self.counts)[pairs][pair] + rank
        return Ragged(self.fields.at(index), counts)
