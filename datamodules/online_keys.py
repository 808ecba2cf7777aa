"""Batches of keys and labels without shards on disk: a frozen language model labels windows while gates are trained.

Labelled windows pass through a buffer from which batches are drawn (`datamodules.replay`). Every process works out the
same draw, reads every n-th window, and contributes its blocks to each batch. The rows of a step therefore do not depend
on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.progress import track
from torch import Tensor

from datamodules.block_loader import BlockLoader, BlockReader, KeyBatch, Resumable
from datamodules.distributed import check_resumed, process_of
from datamodules.replay import Replay
from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, check_window, label_window
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED
from smartkv.models.key_hooks import read_keys
from smartkv.models.layer_ranges import format_layers
from smartkv.shards.in_memory import InMemoryRows
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest, RowBlock, ShardEntry
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts, WindowPlan, check_counts, plan_windows


class OnlineKeys(L.LightningDataModule):
    """Keys and log4 lifespans of a frozen language model, labelled during training, for `fit` and `validate`.

    Args:
        sources: mix of texts.
        windows: windows per split. Those of validation are read once and stay in memory.
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: of the language model: auto, float32, bfloat16 or float16.
        window: tokens per window; one window per forward pass.
        windows_per_document: most windows from one document, unless its source has too few documents.
        threshold: attention probability above which a query hits a key.
        ages: tokens; ages from which future attention is measured, for objectives that need it.
        follow_up: tokens; keys with a shorter horizon are left out, and lifespans are capped here.
        sinks: tokens at the start of a window that are left out.
        inputs: what gates read: keys (before the rotary embedding) or keys_post_rope.
        layers: ranges of layers that get gates, such as "3-19"; null: all, or those that do not slide where some do.
        buffer: training windows in memory at once, over all processes; batches are drawn from them.
        passes: number of times each key is drawn in an epoch.
        batch_size: keys per head and optimiser step over all processes, rounded down to whole blocks.
        block: consecutive keys drawn together; smaller blocks shuffle better.
        seed: seed of the choice of windows and of the draw.
        threads: CPU threads per process.
        trust_remote_code: run code that comes with the model.
    """

    spec: LabelSpec
    in_memory: InMemoryRows
    rows: LabelledKeys
    dataset: BlockReader
    tokens: dict[str, Tensor]
    blocks: list[list[RowBlock]]

    def __init__(
        self,
        sources: list[SourceConfig],
        windows: WindowCounts,
        backbone: str = PACKAGED,
        dtype: str = "auto",
        window: int = 2048,
        windows_per_document: int = 4,
        threshold: float = 0.05,
        ages: tuple[int, ...] = (),
        follow_up: int = 1024,
        sinks: int = 4,
        inputs: Literal["keys", "keys_post_rope"] = "keys",
        layers: str | None = None,
        buffer: int = 16,
        passes: int = 4,
        batch_size: int = 1024,
        block: int = 64,
        seed: int = 0,
        threads: int = 2,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sources, self.counts, self.backbone, self.dtype = sources, asdict(windows), backbone, dtype
        self.window, self.windows_per_document, self.sinks = window, windows_per_document, sinks
        self.threshold, self.ages, self.follow_up = threshold, tuple(ages), follow_up
        self.inputs, self.layers, self.buffer, self.passes = inputs, layers, buffer, passes
        self.batch_size, self.block, self.seed, self.threads = batch_size, block, seed, threads
        self.trust_remote_code = trust_remote_code
        self.plan: WindowPlan = None  # type: ignore[assignment] # until setup

    def setup(self, stage: str) -> None:
        """Load the language model, choose the windows, and label those of validation.

        Raises:
            SmartKVError: an argument is out of range.
        """
        if self.plan is not None:
            return
        if min(self.batch_size, self.block, self.buffer, self.passes, self.threads) < 1 or self.sinks < 0:
            raise SmartKVError(
                "batch_size, block, buffer, passes and threads must be at least 1 and sinks at least 0, got "
                f"{self.batch_size}, {self.block}, {self.buffer}, {self.passes}, {self.threads} and {self.sinks}"
            )
        check_counts(self.counts)
        if min(self.counts["train"], self.counts["validation"]) < 1:
            raise SmartKVError(f"windows of train and validation must be at least 1 each, got {self.counts}")
        self.spec = LabelSpec((self.threshold,), self.ages, self.follow_up)
        torch.set_num_threads(self.threads)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.lm: Backbone = load_backbone(self.backbone, self.dtype, device, self.trust_remote_code)
        check_window(self.lm.model, self.window)
        first = self.trainer is None or self.trainer.is_global_zero
        report: Callable[[str], None] = print if first else lambda line: None
        self.plan = plan_windows(
            self.sources, self.counts, self.lm.tokenizer, self.window, self.windows_per_document, self.seed, report
        )
        self.in_memory = InMemoryRows(self.lm.fingerprint, self.spec)
        self.rows = LabelledKeys(self._manifest(), self.threshold, None, self.inputs, self.layers, self.in_memory)
        self.dataset = BlockReader(self.rows)
        self.tokens = {split: self.plan.of_split(split) for split in ("train", "validation")}
        validation = self.rows.blocks("validation")  # one block per window
        self.blocks = self._by_window("train")
        for block in self._tracked(self.of_this_process(validation), "Validation keys"):
            self._read("validation", _number(block), [block])

    def _manifest(self) -> Manifest:
        """Return the manifest that a harvest of these windows would write with one window per shard."""
        shards = [
            ShardEntry(_name(split, number), split, 1, self.window, 0, "")
            for split in ("train", "validation")
            for number in range(len(self.plan.of_split(split)))
        ]
        arguments: dict[str, Any] = {"backbone": self.backbone}
        arguments["dtype"] = str(self.lm.model.dtype).removeprefix("torch.")
        arguments["sliding_windows"] = list(self.lm.architecture.sliding_windows)
        return Manifest(
            Path("online"),
            self.lm.fingerprint,
            self.spec,
            self.window,
            self.sinks,
            self.plan.sources,
            self.plan.documents,
            arguments,
            shards,
        )

    # -- windows of this process ------------------------------------------------------------------------------------

    def owns(self, number: int) -> bool:
        """Return whether this process reads the window with that index."""
        rank, world = process_of(self.trainer)
        return number % world == rank

    def of_this_process(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """Return the blocks that are in this process's memory."""
        return [block for block in blocks if self.owns(_number(block))]

    def first_blocks(self, split: str) -> list[RowBlock]:
        """Return the blocks of a split that this process checks and averages before the first step.

        For `train` these are the windows that fill the buffer first. They are read here and stay in memory, so that the
        first step finds them.
        """
        if split == "train":
            first = range(min(self.buffer, len(self.blocks)))
            for number in self._tracked([number for number in first if self.owns(number)], "First keys"):
                self.read([number])
            return self.of_this_process([block for number in first for block in self.blocks[number]])
        return self.of_this_process(self.rows.blocks(split))

    def _tracked(self, work: list[Any], description: str) -> Iterable[Any]:
        """Return `work` with a progress bar on one process."""
        quiet = self.trainer is not None and not self.trainer.is_global_zero
        return track(work, description, disable=quiet, transient=True)

    def _by_window(self, split: str) -> list[list[RowBlock]]:
        """Return the blocks of each window of a split."""
        by_window: dict[int, list[RowBlock]] = {}
        for block in self.rows.blocks(split, min(self.block, self.batch_size)):
            by_window.setdefault(_number(block), []).append(block)
        return [by_window[number] for number in sorted(by_window)]

    def calibration_keys(self, windows: int) -> list[list[Tensor]]:
        """Return the keys before the rotary embedding of the first training windows, as `LifespanShards` does."""
        return [read_keys(self.lm.model, ids) for ids in self.tokens["train"][:windows]]

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, numbers: list[int], live: set[RowBlock] | None = None) -> None:
        """Label training windows of this process and keep their blocks in memory.

        Windows whose blocks are all in memory are not read again.

        Args:
            numbers: indices of the windows; those of other processes are skipped.
            live: blocks to keep; None: all blocks of the windows.
        """
        for number in numbers:
            blocks = [block for block in self.blocks[number] if live is None or block in live]
            if self.owns(number) and any(block not in self.in_memory for block in blocks):
                self._read("train", number, blocks)

    def _read(self, split: str, number: int, blocks: list[RowBlock]) -> None:
        tokens = self.tokens[split][number]
        labels = label_window(self.lm.model, tokens, self.spec, self.inputs == "keys_post_rope")
        self.in_memory.hold(blocks, labels, tokens)

    def release(self) -> None:
        """Free the blocks that an interrupted epoch left, except whole windows that the next epoch begins with."""
        for number, blocks in enumerate(self.blocks):
            present = [block for block in blocks if block in self.in_memory]
            if number >= self.buffer or len(present) < len(blocks):
                for block in present:
                    self.in_memory.drop(block)

    def train_dataloader(self) -> "ReplayLoader":
        """Return the loader that draws training batches from the buffer."""
        loader = ReplayLoader(self)
        if self.trainer:
            loader.set_epoch(self.trainer.current_epoch)  # otherwise a resumed run replays epoch 0 first
        return loader

    def val_dataloader(self) -> BlockLoader:
        """Return the loader of validation batches, at least 1024 rows each."""
        blocks = self.rows.blocks("validation", min(self.block, self.batch_size))
        return _InMemoryLoader(self, blocks)

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the keys, their labels and their order, for the check on resume."""
        names = (
            "seed",
            "batch_size",
            "block",
            "buffer",
            "passes",
            "window",
            "threshold",
            "follow_up",
            "sinks",
            "inputs",
        )
        model = {"fingerprint": asdict(self.lm.fingerprint), "dtype": str(self.lm.model.dtype).removeprefix("torch.")}
        drawn = {"windows": self.counts, "ages": list(self.ages), "layers": format_layers(self.rows.layers)}
        return {name: getattr(self, name) for name in names} | drawn | model | {"tokens": self.plan.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint was made on the same data."""
        check_resumed(state, self.state_dict())


class _InMemoryLoader(BlockLoader):
    """Loader of batches in order; each process contributes the blocks in its memory."""

    def __init__(self, data: OnlineKeys, blocks: list[RowBlock]) -> None:
        super().__init__(data.dataset, blocks, max(data.batch_size, 1024), None, 0, 1)
        self.data = data

    def of_this_process(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """Return the blocks of a batch that are in this process's memory."""
        return self.data.of_this_process(blocks)


class ReplayLoader(Resumable):
    """Loader of training batches in the order of a `Replay`.

    A loader that resumes inside an epoch first reads the windows again that the buffer holds at that place.

    Args:
        data: the datamodule whose buffer is drawn from.
    """

    def __init__(self, data: OnlineKeys) -> None:
        super().__init__()
        self.data = data

    def replay(self) -> Replay:
        """Return the draw of the current epoch."""
        data = self.data
        size = min(data.block, data.batch_size)
        per_step = max(1, data.batch_size // size)
        return Replay(data.blocks, data.buffer, data.passes, per_step, (data.seed, self.epoch))

    def __len__(self) -> int:
        return len(self.replay())

    def __iter__(self) -> Iterator[KeyBatch]:
        # a generator: this runs at the first `next`, after set_epoch and load_state_dict
        replay, data = self.replay(), self.data
        if self.consumed >= len(replay):
            self.consumed = 0
        resume_at = self.consumed
        if not resume_at:
            data.release()
        for number, step in enumerate(replay):
            if number < resume_at:
                if number == resume_at - 1:  # the replay's buffer is now that of the resumed step
                    live = {block for block, _ in replay.live}
                    data.read(sorted({_number(block) for block in live}), live)
                continue
            data.read(step.read)
            blocks = data.of_this_process(step.draw)
            batch = data.dataset[blocks, sum(block.stop - block.start for block in step.draw)]
            for block in data.of_this_process(step.done):
                data.in_memory.drop(block)
            self.consumed += 1
            yield batch
        self.consumed = 0


def _name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def _number(block: RowBlock) -> int:
    return int(block.file.rpartition("-")[2])
