"""Batches of keys and labels streamed from harvested shards, the training data of gates.

An epoch is a permutation of all blocks of a split, across documents and shards; a batch takes the next few blocks. Each
process reads its part of every batch, so the rows of a step do not depend on the number of processes.
"""

from typing import Any, Literal

import lightning as L
from torch import Tensor

from datamodules.block_loader import BlockLoader, BlockReader
from datamodules.distributed import check_resumed, failing_together, process_of
from smartkv.errors import SmartKVError
from smartkv.models.layer_ranges import format_layers
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.shards.reader import ShardReader
from smartkv.texts.windows import WindowPlan, read_plan


class LifespanShards(L.LightningDataModule):
    """Keys and log4 lifespans from harvested shards, for `fit` and `validate`.

    Args:
        shards: folder that a harvest wrote.
        threshold: attention probability above which a query hits a key; one of the harvest's thresholds.
        follow_up: tokens; keys with a shorter horizon are left out, and lifespans are capped here. Null: the harvest's.
        inputs: what gates read: keys (before the rotary embedding) or keys_post_rope (if harvested).
        layers: ranges of layers that get gates, such as "3-19"; null: all, or those that do not slide where some do.
        batch_size: keys per head and optimiser step over all processes, rounded down to whole blocks.
        block: consecutive keys read together; smaller blocks shuffle better, larger ones read faster.
        seed: seed of the order of blocks.
        num_workers: reader processes; 0 reads in the training process.
        verify: compare each shard that is used with its SHA-256 before the first step.
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
        """Open the shards and verify this process's part of them.

        Raises:
            SmartKVError: an argument is out of range, a shard is damaged, or a split has no keys.
        """
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
            self.blocks(split)  # raises if the split has no keys

    @property
    def plan(self) -> WindowPlan:
        """The harvested windows."""
        return read_plan(self.rows.manifest.folder)

    def calibration_keys(self, windows: int) -> list[list[Tensor]]:
        """Return the keys before the rotary embedding of the first training windows, for prices of a policy.

        Args:
            windows: number of windows, or all where there are fewer.

        Returns:
            Of each window, of each layer of the model: `[1, kv_heads, tokens, head_dim]`.
        """
        manifest, reader = self.rows.manifest, ShardReader(self.rows.manifest.folder)
        starts = [(entry.file, number) for entry in manifest.of_split("train") for number in range(entry.windows)]
        length = manifest.window
        blocks = [RowBlock(file, number, number * length, (number + 1) * length) for file, number in starts[:windows]]
        return [[layer[None] for layer in reader.read(block, "keys")] for block in blocks]

    def blocks(self, split: str) -> list[RowBlock]:
        """Return all blocks of a split, the units of the shuffle."""
        return self.rows.blocks(split, min(self.block, self.batch_size))

    def first_blocks(self, split: str) -> list[RowBlock]:
        """Return the whole windows that this process checks and averages before the first step."""
        rank, world = process_of(self.trainer)
        return self.rows.blocks(split)[rank::world]

    def _loader(self, split: str, shuffle: bool, batch_size: int) -> BlockLoader:
        rank, world = process_of(self.trainer)
        blocks = self.blocks(split)
        return BlockLoader(
            self.dataset, blocks, batch_size, self.seed if shuffle else None, rank, world, self.num_workers
        )

    def train_dataloader(self) -> BlockLoader:
        """Return the loader of shuffled training batches."""
        loader = self._loader("train", True, self.batch_size)
        if self.trainer:
            loader.set_epoch(self.trainer.current_epoch)  # otherwise a resumed run replays epoch 0 first
        return loader

    def val_dataloader(self) -> BlockLoader:
        """Return the loader of validation batches, at least 1024 rows each."""
        return self._loader("validation", False, max(self.batch_size, 1024))

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the keys, their labels and their order, for the check on resume."""
        rows = self.rows
        settings = {"threshold": rows.threshold, "follow_up": rows.follow_up, "inputs": rows.inputs}
        order = {"seed": self.seed, "batch_size": self.batch_size, "block": self.block}
        return order | settings | {"layers": format_layers(rows.layers), "shards": rows.manifest.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint was made on the same data."""
        check_resumed(state, self.state_dict())
