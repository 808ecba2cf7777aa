"""Batches of labelled keys, in an order that seed and epoch decide; resumes inside an epoch."""

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
    """Rows of all gates.

    Attributes:
        keys: float16 `[gates, rows, head_dim]`.
        labels: of these keys; its `log4_lifespan` is `target`.
        position, token: int32 `[rows]`.
        global_rows: rows that all processes together hold of this batch.
    """

    keys: Tensor
    labels: Labels
    position: Tensor
    token: Tensor
    global_rows: int

    @property
    def target(self) -> Tensor:
        """float32 `[gates, rows]`, log4 lifespan capped at the follow-up."""
        return self.labels.log4_lifespan

    def to(self, device: torch.device, **_: Any) -> "KeyBatch":
        keys, position, token = (t.to(device, non_blocking=True) for t in (self.keys, self.position, self.token))
        return KeyBatch(keys, self.labels.to(device), position, token, self.global_rows)


class BlockReader(Dataset):
    """Reads a list of blocks as one `KeyBatch`. `__getitem__` takes (blocks of this process, rows of all)."""

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
    """A loader that can be stopped and taken up inside an epoch.

    Lightning saves `state_dict` with a checkpoint and calls `set_epoch` on `sampler` before each epoch.
    """

    def __init__(self) -> None:
        self.sampler, self.batch_sampler = self, None  # where Lightning looks for set_epoch
        self.epoch = self.consumed = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:  # in the same one, a resumed run goes on where it was
            self.epoch, self.consumed = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.consumed = state["epoch"], state["consumed"]


class BlockLoader(Resumable):
    """Batches of blocks, in an order that seed and epoch decide."""

    def __init__(
        self,
        dataset: BlockReader,
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
        """This process's blocks of every batch of the current epoch, and the rows of all processes."""
        order = torch.arange(len(self.blocks))
        if self.shuffle_seed is not None:
            generator = torch.Generator().manual_seed(self.shuffle_seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(self.blocks), generator=generator)
        batches = []
        for chosen in order.split(self.blocks_per_batch):
            blocks = [self.blocks[i] for i in chosen.tolist()]
            rows = sum(block.stop - block.start for block in blocks)
            batches.append((self.mine(blocks), rows))
        return batches

    def mine(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """Those of a batch that this process reads."""
        return blocks[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[KeyBatch]:
        # the body runs at the first `next`, after set_epoch and load_state_dict
        batches = self.batches()
        if self.consumed >= len(batches):
            self.consumed = 0
        loader = DataLoader(
            self.dataset,
            sampler=batches[self.consumed :],  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
        )
        for batch in loader:
            self.consumed += 1
            yield batch
        self.consumed = 0
