"""Token windows of a weighted mix of texts, for `fit`: what gates are distilled on."""

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
    """Some windows.

    Attributes:
        tokens: int64 `[windows, window]`.
        number: int64 `[windows]`, which of the split's windows they are.
        global_windows: windows that all processes together hold of this batch.
    """

    tokens: Tensor
    number: Tensor
    global_windows: int

    def to(self, device: torch.device, **_: Any) -> "WindowBatch":
        return WindowBatch(self.tokens.to(device), self.number.to(device), self.global_windows)


class _Windows(Dataset):
    """`__getitem__` takes (windows of this process, as blocks of one; windows of all)."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.long()

    def __getitem__(self, item: tuple[list[RowBlock], int]) -> WindowBatch:
        blocks, global_windows = item
        number = torch.tensor([block.window for block in blocks], dtype=torch.int64)
        return WindowBatch(self.tokens[number], number, global_windows)


class TokenWindows(L.LightningDataModule):
    """Windows of a weighted mix of texts, for `fit` and `validate`.

    Args:
        sources: the mix.
        windows: windows of each split.
        backbone: hub id, local folder, .gguf file or smollm2-135m; here its tokenizer is used.
        window: tokens a window.
        windows_per_document: most windows taken from one long document, unless its source runs out.
        batch_size: windows an optimiser step, over all processes together.
        seed: of the choice and the order of windows.
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
        self.plan: WindowPlan | None = None

    def setup(self, stage: str) -> None:
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
        say = print if self.trainer is None or self.trainer.is_global_zero else str
        self.plan = plan_windows(
            self.sources, self.counts, tokenizer, self.window, self.windows_per_document, self.seed, say
        )

    def _loader(self, split: str, shuffle: bool) -> BlockLoader:
        rank, world = process_of(self.trainer)
        tokens = self.plan.of_split(split)
        blocks = [RowBlock("", number, 0, 1) for number in range(len(tokens))]
        size, seed = (self.batch_size, self.seed) if shuffle else (world, None)
        return BlockLoader(_Windows(tokens), blocks, size, seed, rank, world)

    def train_dataloader(self) -> BlockLoader:
        loader = self._loader("train", shuffle=True)
        if self.trainer:
            loader.set_epoch(self.trainer.current_epoch)  # or a resumed run replays epoch 0 first
        return loader

    def val_dataloader(self) -> BlockLoader:
        """One window a process."""
        return self._loader("validation", shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """Which windows come, and in which order."""
        known = {"seed": self.seed, "batch_size": self.batch_size, "window": self.window, "windows": self.counts}
        return known | {"tokens": self.plan.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_resumed(state, self.state_dict())
