"""Shards -> batches of keys and targets, streamed: what the gates are trained on.

An epoch is a permutation of all blocks of the split, over documents and shards; a batch takes the next few of them.
Each process reads its part of every batch, so the rows of step n do not depend on how many processes there are.
"""

from typing import Any, Literal

import lightning as L

from datamodules.block_loader import BlockLoader, BlockReader
from datamodules.distributed import check_resumed, failing_together, process_of
from smartkv.errors import SmartKVError
from smartkv.models.layer_ranges import format_layers
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.texts.windows import WindowPlan, read_plan


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
        self.rows = LabelledKeys(manifest, self.threshold, self.follow_up, self.inputs, self.layers)
        self.dataset = BlockReader(self.rows)
        for split in ("train", "validation"):
            self.blocks(split)  # both are needed, so say at once if one is missing

    @property
    def plan(self) -> WindowPlan:
        """The windows that were harvested."""
        return read_plan(self.rows.manifest.folder)

    def blocks(self, split: str) -> list[RowBlock]:
        return self.rows.blocks(split, min(self.block, self.batch_size))

    def first_blocks(self, split: str) -> list[RowBlock]:
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
