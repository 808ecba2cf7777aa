"""Text -> keys and lifespans -> batches, with no shards between: a frozen LM reads windows while gates are trained.

Labelled windows flow through a buffer from which batches are drawn (`datamodules.replay`). Every process works out the
same draw, reads every n-th window, and gives to each batch what it holds of it: the rows of step n do not depend on how
many processes there are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.progress import track

from datamodules.block_loader import BlockLoader, BlockReader, KeyBatch, Resumable
from datamodules.distributed import check_resumed, process_of
from datamodules.replay import Replay
from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, check_window, label_window
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED
from smartkv.models.layer_ranges import format_layers
from smartkv.shards.in_memory import InMemoryRows
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest, RowBlock, ShardEntry
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts, WindowPlan, check_counts, plan_windows


class OnlineKeys(L.LightningDataModule):
    """Keys and log4 lifespans of a frozen LM, labelled while gates are trained, for `fit` and `validate`.

    Args:
        sources: the mix.
        windows: windows of each split. Those of validation are read once and held.
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: of the LM: auto, float32, bfloat16 or float16.
        window: tokens a window, one forward pass each.
        windows_per_document: most windows from one long document, unless its source runs out.
        threshold: attention probability that counts as a hit.
        ages: tokens; future attention is measured from these ages on, for objectives that want it.
        follow_up: tokens; only keys with at least this horizon are used, lifespans are capped here.
        sinks: tokens at the start of a window that are left out.
        inputs: what the gates read: keys (before the rotary embedding) or keys_post_rope.
        layers: ranges of layers that get gates, such as "3-19"; null: all.
        buffer: training windows whose keys are held at once, over all processes: batches are drawn from them.
        passes: how often each key is drawn in an epoch.
        batch_size: keys a head an optimiser step, over all processes together; whole blocks, so at most so many.
        block: consecutive keys drawn at once; smaller shuffles better.
        seed: of the choice of windows and of the draw.
        threads: CPU threads a process.
        trust_remote_code: run code that comes with the model.
    """

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
        self.plan: WindowPlan | None = None

    def setup(self, stage: str) -> None:
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
        say = print if self.trainer is None or self.trainer.is_global_zero else str
        self.plan = plan_windows(
            self.sources, self.counts, self.lm.tokenizer, self.window, self.windows_per_document, self.seed, say
        )
        self.held = InMemoryRows(self.lm.fingerprint, self.spec)
        self.rows = LabelledKeys(self._manifest(), self.threshold, None, self.inputs, self.layers, self.held)
        self.dataset = BlockReader(self.rows)
        self.tokens = {split: self.plan.of_split(split) for split in ("train", "validation")}
        validation = self.rows.blocks("validation")  # one a window
        self.blocks = self._by_window("train")
        for block in self._tracked(self.mine(validation), "Validation keys"):
            self._read("validation", _number(block), [block])

    def _manifest(self) -> Manifest:
        """What a harvest of the same windows would have written, with a file a window."""
        shards = [
            ShardEntry(_name(split, number), split, 1, self.window, 0, "")
            for split in ("train", "validation")
            for number in range(len(self.plan.of_split(split)))
        ]
        arguments = {"backbone": self.backbone, "dtype": str(self.lm.model.dtype).removeprefix("torch.")}
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

    # -- whose windows ----------------------------------------------------------------------------------------------

    def owns(self, number: int) -> bool:
        """Whether this process reads a window of that number."""
        rank, world = process_of(self.trainer)
        return number % world == rank

    def mine(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """Those that this process holds."""
        return [block for block in blocks if self.owns(_number(block))]

    def first_blocks(self, split: str) -> list[RowBlock]:
        """What this process checks, and averages, before the first step: validation, and the first windows of the
        buffer, which are then there already when the first step asks for them."""
        if split == "train":
            first = range(min(self.buffer, len(self.blocks)))
            for number in self._tracked([number for number in first if self.owns(number)], "First keys"):
                self.read([number])
            return self.mine([block for number in first for block in self.blocks[number]])
        return self.mine(self.rows.blocks(split))

    def _tracked(self, work: list[Any], description: str) -> Iterable[Any]:
        """With a progress bar, of one process."""
        quiet = self.trainer is not None and not self.trainer.is_global_zero
        return track(work, description, disable=quiet, transient=True)

    def _by_window(self, split: str) -> list[list[RowBlock]]:
        """The blocks of each window."""
        found: dict[int, list[RowBlock]] = {}
        for block in self.rows.blocks(split, min(self.block, self.batch_size)):
            found.setdefault(_number(block), []).append(block)
        return [found[number] for number in sorted(found)]

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, numbers: list[int], live: set[RowBlock] | None = None) -> None:
        """Label the training windows of these numbers that this process owns, and hold their blocks (of `live` alone,
        if it is given). What is held already is not read again."""
        for number in numbers:
            blocks = [block for block in self.blocks[number] if live is None or block in live]
            if self.owns(number) and any(block not in self.held for block in blocks):
                self._read("train", number, blocks)

    def _read(self, split: str, number: int, blocks: list[RowBlock]) -> None:
        tokens = self.tokens[split][number]
        labels = label_window(self.lm.model, tokens, self.spec, self.inputs == "keys_post_rope")
        self.held.hold(blocks, labels, tokens)

    def release(self) -> None:
        """What an epoch that was cut short has left, but for the windows with which an epoch begins."""
        for number, blocks in enumerate(self.blocks):
            held = [block for block in blocks if block in self.held]
            if number >= self.buffer or len(held) < len(blocks):
                for block in held:
                    self.held.drop(block)

    def train_dataloader(self) -> "ReplayLoader":
        loader = ReplayLoader(self)
        if self.trainer:
            loader.set_epoch(self.trainer.current_epoch)  # or a resumed run replays epoch 0 first
        return loader

    def val_dataloader(self) -> BlockLoader:
        blocks = self.rows.blocks("validation", min(self.block, self.batch_size))
        return _Held(self, blocks)

    def state_dict(self) -> dict[str, Any]:
        """Which keys come, with which labels, and in which order."""
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
        check_resumed(state, self.state_dict())


class _Held(BlockLoader):
    """Batches in order, of which each process gives what it holds."""

    def __init__(self, data: OnlineKeys, blocks: list[RowBlock]) -> None:
        super().__init__(data.dataset, blocks, max(data.batch_size, 1024), None, 0, 1)
        self.data = data

    def mine(self, blocks: list[RowBlock]) -> list[RowBlock]:
        return self.data.mine(blocks)


class ReplayLoader(Resumable):
    """Batches by `Replay`. Taken up inside an epoch, it reads the windows again that the buffer then holds."""

    def __init__(self, data: OnlineKeys) -> None:
        super().__init__()
        self.data = data

    def replay(self) -> Replay:
        """The draw of the current epoch."""
        data = self.data
        size = min(data.block, data.batch_size)
        per_step = max(1, data.batch_size // size)
        return Replay(data.blocks, data.buffer, data.passes, per_step, (data.seed, self.epoch))

    def __len__(self) -> int:
        return len(self.replay())

    def __iter__(self) -> Iterator[KeyBatch]:
        # the body runs at the first `next`, after set_epoch and load_state_dict
        replay, data = self.replay(), self.data
        if self.consumed >= len(replay):
            self.consumed = 0
        behind = self.consumed
        if not behind:
            data.release()
        for number, step in enumerate(replay):
            if number < behind:
                if number == behind - 1:  # what the buffer holds now
                    live = {block for block, _ in replay.live}
                    data.read(sorted({_number(block) for block in live}), live)
                continue
            data.read(step.read)
            mine = data.mine(step.draw)
            batch = data.dataset[mine, sum(block.stop - block.start for block in step.draw)]
            for block in data.mine(step.done):
                data.held.drop(block)
            self.consumed += 1
            yield batch
        self.consumed = 0


def _name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def _number(block: RowBlock) -> int:
    return int(block.file.rpartition("-")[2])
