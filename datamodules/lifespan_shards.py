"""Shards -> batches of keys and targets, streamed: what the gates are trained on.

An epoch is a permutation of all blocks of the split, over documents and shards; a batch takes the next few of them.
Each process reads its part of every batch, so the rows of step n do not depend on how many processes there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.documents import read_plan
from datamodules.processes import check_resumed, failing_together, process_of
from datamodules.window_plan import WindowPlan
from smartkv.errors import SmartKVError
from smartkv.gates import format_layers
from smartkv.objectives import Labels
from smartkv.rows import LabelledRows
from smartkv.shards import Block, Manifest


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

    def __init__(self, rows: LabelledRows) -> None:
        self.rows = rows
        self.empty = Block(rows.manifest.shards[0].file, 0, 0, 0)

    def __getitem__(self, item: tuple[list[Block], int]) -> KeyBatch:
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
        blocks: list[Block],
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

    def batches(self) -> list[tuple[list[Block], int]]:
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

    def mine(self, blocks: list[Block]) -> list[Block]:
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


class LifespanShards(L.LightningDataModule):
    """Keys and log4 lifespans from harvested shards, for `fit` and `validate`.

    Args:
        shards: folder that a harvest made.
        threshold: attention probability that counts as a hit; one of those harvested.
        follow_up: tokens; only keys with at least this horizon are used, lifespans are capped here.
            Null: what the harvest had.
        inputs: what the gates read: keys (before the rotary embedding) or keys_post_rope (if harvested).
        layers: ranges of layers that get gates, such as "3-19"; null: all.
        batch_size: keys a head an optimiser step, over all processes together; whole blocks, so at most so many.
        block: consecutive keys read at once; smaller shuffles better, larger reads faster.
        seed: of the order of blocks.
        num_workers: reader processes; 0 reads in the training process.
        verify: read each shard that is used whole before the first step, and compare it with its SHA-256.
    """

    def __init__(
        self,
        shards: str,
        threshold: float = 0.05,
        follow_up: int | None = None,
        inputs: Literal["keys", "keys_post_rope"] = "keys",
        layers: str | None = None,
        batch_size: int = 1024,
        block: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        verify: bool = True,
    ) -> None:
        super().__init__()
        self.verify = verify
        self.shards, self.threshold, self.follow_up = shards, threshold, follow_up
        self.inputs, self.layers = inputs, layers
        self.batch_size, self.block, self.seed, self.num_workers = batch_size, block, seed, num_workers

    def setup(self, stage: str) -> None:
        if min(self.batch_size, self.block) < 1:
            raise SmartKVError(f"batch_size and block must be at least 1, got {self.batch_size} and {self.block}")
        manifest = Manifest.read(self.shards)
        if self.verify:
            rank, world = process_of(self.trainer)
            read = manifest.shards if stage == "fit" else manifest.of_split("validation")
            with failing_together():
                manifest.verify(read[rank::world])
        self.rows = LabelledRows(manifest, self.threshold, self.follow_up, self.inputs, self.layers)
        self.dataset = BlockReader(self.rows)
        for split in ("train", "validation"):
            self.blocks(split)  # both are needed, so say at once if one is missing

    @property
    def plan(self) -> WindowPlan:
        """The windows that were harvested."""
        return read_plan(self.rows.manifest.folder)

    def blocks(self, split: str) -> list[Block]:
        return self.rows.blocks(split, min(self.block, self.batch_size))

    def at_first(self, split: str) -> list[Block]:
        """What this process checks, and averages, before the first step: its part of whole windows."""
        rank, world = process_of(self.trainer)
        return self.rows.blocks(split)[rank::world]

    def _loader(self, split: str, shuffle: bool, batch_size: int) -> BlockLoader:
        rank, world = process_of(self.trainer)
        blocks = self.blocks(split)
        return BlockLoader(
            self.dataset, blocks, batch_size, self.seed if shuffle else None, rank, world, self.num_workers
        )

    def train_dataloader(self) -> BlockLoader:
        loader = self._loader("train", True, self.batch_size)
        if self.trainer:
            loader.set_epoch(self.trainer.current_epoch)  # or a resumed run replays epoch 0 first
        return loader

    def val_dataloader(self) -> BlockLoader:
        return self._loader("validation", False, max(self.batch_size, 1024))

    def state_dict(self) -> dict[str, Any]:
        """Which keys come, with which labels, and in which order."""
        rows = self.rows
        settings = {"threshold": rows.threshold, "follow_up": rows.follow_up, "inputs": rows.inputs}
        order = {"seed": self.seed, "batch_size": self.batch_size, "block": self.block}
        return order | settings | {"layers": format_layers(rows.layers), "shards": rows.manifest.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_resumed(state, self.state_dict())
