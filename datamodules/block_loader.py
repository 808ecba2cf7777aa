"""Batches of labelled keys in an order that depends on seed and epoch alone, resumable inside an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smartkv.labels.key_labels import Labels
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import RowBlock


@dataclass
class KeyBatch:
    """Labelled keys of all gates: this process's part of a batch.

    Attributes:
        keys: float16 `[gates, rows, head_dim]`.
        labels: labels of these keys.
        position: int32 `[rows]`, position of each key in its window.
        token: int32 `[rows]`, token id of each key.
        global_rows: rows of the batch over all processes.
    """

    keys: Tensor
    labels: Labels
    position: Tensor
    token: Tensor
    global_rows: int

    @property
    def target(self) -> Tensor:
        """Log4 lifespan capped at the follow-up, float32 `[gates, rows]`."""
        return self.labels.log4_lifespan

    def to(self, device: torch.device, **_: Any) -> "KeyBatch":
        """Copy the batch to a device; Lightning calls this before each step."""
        keys, position, token = (t.to(device, non_blocking=True) for t in (self.keys, self.position, self.token))
        return KeyBatch(keys, self.labels.to(device), position, token, self.global_rows)


class BlockReader(Dataset):
    """Dataset that reads a list of blocks as one `KeyBatch`.

    An index is a pair: the blocks of this process, and the batch's rows over all processes.

    Args:
        rows: the labelled keys to read from.
    """

    def __init__(self, rows: LabelledKeys) -> None:
        self.rows = rows
        self.empty = RowBlock(rows.manifest.shards[0].file, 0, 0, 0)

    def __getitem__(self, item: tuple[list[RowBlock], int]) -> KeyBatch:
        blocks, global_rows = item
        blocks = blocks or [self.empty]  # a process without rows still takes part in every step
        return KeyBatch(
            keys=self.rows.keys(*blocks),
            labels=self.rows.labels(*blocks),
            position=self.rows.position(*blocks),
            token=self.rows.token(*blocks),
            global_rows=global_rows,
        )


class Resumable:
    """Base of loaders that resume inside an epoch.

    Lightning saves `state_dict` with a checkpoint and calls `set_epoch` on `sampler` before each epoch.

    Attributes:
        epoch: current epoch.
        consumed: batches of this epoch that were handed out.
    """

    def __init__(self) -> None:
        self.sampler, self.batch_sampler = self, None  # Lightning looks for set_epoch in these
        self.epoch = self.consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; a call with the current one changes nothing, so that a resumed run keeps its place."""
        if epoch != self.epoch:
            self.epoch, self.consumed = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place."""
        self.epoch, self.consumed = state["epoch"], state["consumed"]


class BlockLoader(Resumable):
    """Loader of batches of blocks, in an order that depends on seed and epoch alone.

    Every process works out the same batches and reads its part of each, so the rows of a step do not depend on the
    number of processes.

    Args:
        dataset: reads the blocks; any dataset indexed as `BlockReader` is.
        blocks: all blocks of an epoch.
        batch_size: rows per batch over all processes, rounded down to whole blocks, at least one.
        shuffle_seed: seed of the order; None: the order of `blocks`.
        rank: number of this process.
        world_size: number of processes.
        num_workers: reader processes; 0 reads in this process.
    """

    def __init__(
        self,
        dataset: Dataset,
        blocks: list[RowBlock],
        batch_size: int,
        shuffle_seed: int | None,
        rank: int,
        world_size: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.blocks, self.batch_size, self.shuffle_seed = dataset, blocks, batch_size, shuffle_seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        size = max(block.stop - block.start for block in blocks)
        self.blocks_per_batch = max(1, batch_size // size)

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.blocks_per_batch)

    def batches(self) -> list[tuple[list[RowBlock], int]]:
        """Return this process's blocks of each batch of the current epoch, with the batch's rows over all processes."""
        order = torch.arange(len(self.blocks))
        if self.shuffle_seed is not None:
            generator = torch.Generator().manual_seed(self.shuffle_seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(self.blocks), generator=generator)
        batches = []
        for chosen in order.split(self.blocks_per_batch):
            blocks = [self.blocks[i] for i in chosen.tolist()]
            rows = sum(block.stop - block.start for block in blocks)
            batches.append((self.of_this_process(blocks), rows))
        return batches

    def of_this_process(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """Return the blocks of a batch that this process reads."""
        return blocks[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[KeyBatch]:
        # a generator: this runs at the first `next`, after set_epoch and load_state_dict
        batches = self.batches()
        if self.consumed >= len(batches):
            self.consumed = 0
        loader = DataLoader(
            self.dataset,
            sampler=batches[self.consumed :],
            batch_size=None,
            num_workers=self.num_workers,
        )
        for batch in loader:
            self.consumed += 1
            yield batch
        self.consumed = 0
