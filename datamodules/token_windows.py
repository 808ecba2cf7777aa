"""Token windows of a weighted mix of texts, the training data of distillation and eviction tuning."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.block_loader import BlockLoader
from datamodules.distributed import check_resumed, process_of
from smartkv.errors import SmartKVError
from smartkv.models.backbone import load_tokenizer, read_architecture
from smartkv.models.gguf import PACKAGED
from smartkv.shards.manifest import RowBlock
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts, WindowPlan, check_counts, plan_windows


@dataclass
class WindowBatch:
    """Token windows: this process's part of a batch.

    Attributes:
        tokens: int64 `[windows, window]`.
        number: int64 `[windows]`, index of each window in its split.
        global_windows: windows of the batch over all processes.
    """

    tokens: Tensor
    number: Tensor
    global_windows: int

    def to(self, device: torch.device, **_: Any) -> "WindowBatch":
        """Copy the batch to a device; Lightning calls this before each step."""
        return WindowBatch(self.tokens.to(device), self.number.to(device), self.global_windows)


class _Windows(Dataset):
    """Dataset of windows, indexed by (this process's windows as blocks of one row, windows over all processes)."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.long()

    def __getitem__(self, item: tuple[list[RowBlock], int]) -> WindowBatch:
        blocks, global_windows = item
        number = torch.tensor([block.window for block in blocks], dtype=torch.int64)
        return WindowBatch(self.tokens[number], number, global_windows)


class TokenWindows(L.LightningDataModule):
    """Windows of a weighted mix of texts, for `fit` and `validate`.

    Args:
        sources: mix of texts.
        windows: windows per split; at least one each for train and validation.
        backbone: hub id, local folder, .gguf file or smollm2-135m; only its tokenizer is used.
        window: tokens per window.
        windows_per_document: most windows from one document, unless its source has too few documents.
        batch_size: windows per batch over all processes; at least one per process.
        seed: seed of the choice and the order of windows.
        trust_remote_code: run code that comes with the tokenizer.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        windows: WindowCounts,
        backbone: str = PACKAGED,
        window: int = 1024,
        windows_per_document: int = 4,
        batch_size: int = 1,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sources, self.counts, self.backbone, self.window = sources, asdict(windows), backbone, window
        self.windows_per_document, self.batch_size, self.seed = windows_per_document, batch_size, seed
        self.trust_remote_code = trust_remote_code
        self.plan: WindowPlan = None  # type: ignore[assignment] # until setup

    def setup(self, stage: str) -> None:
        """Choose and tokenize the windows of all splits.

        Raises:
            SmartKVError: an argument is out of range.
        """
        if self.plan is not None:
            return
        processes = self.trainer.world_size if self.trainer else 1
        if self.batch_size < processes:
            raise SmartKVError(
                f"batch_size must be at least 1 window a process, of which there are {processes}, got {self.batch_size}"
            )
        check_counts(self.counts)
        if min(self.counts["train"], self.counts["validation"]) < 1:
            raise SmartKVError(f"windows of train and validation must be at least 1 each, got {self.counts}")
        limit = read_architecture(self.backbone, self.trust_remote_code).max_positions
        if self.window > limit:
            raise SmartKVError(f"window {self.window} is longer than the {limit} positions of '{self.backbone}'")
        tokenizer = load_tokenizer(self.backbone, self.trust_remote_code)
        first = self.trainer is None or self.trainer.is_global_zero
        report: Callable[[str], None] = print if first else lambda line: None
        self.plan = plan_windows(
            self.sources, self.counts, tokenizer, self.window, self.windows_per_document, self.seed, report
        )

    def _loader(self, split: str, shuffle: bool) -> BlockLoader:
        rank, world = process_of(self.trainer)
        tokens = self.plan.of_split(split)
        blocks = [RowBlock("", number, 0, 1) for number in range(len(tokens))]
        size, seed = (self.batch_size, self.seed) if shuffle else (world, None)
        return BlockLoader(_Windows(tokens), blocks, size, seed, rank, world)

    def train_dataloader(self) -> BlockLoader:
        """Return the loader of shuffled training batches."""
        loader = self._loader("train", shuffle=True)
        if self.trainer:
            loader.set_epoch(self.trainer.current_epoch)  # otherwise a resumed run replays epoch 0 first
        return loader

    def val_dataloader(self) -> BlockLoader:
        """Return the loader of validation batches, one window per process each."""
        return self._loader("validation", shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the windows and their order, for the check on resume."""
        arguments = {"seed": self.seed, "batch_size": self.batch_size, "window": self.window, "windows": self.counts}
        return arguments | {"tokens": self.plan.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint was made on the same windows."""
        check_resumed(state, self.state_dict())
