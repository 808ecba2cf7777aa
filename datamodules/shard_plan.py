"""Which windows a harvest reads, and how they are cut into shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smartkv.shards.manifest import SPLITS
from smartkv.texts.windows import WindowPlan


class WindowRuns(Sequence):
    """Item = the windows of one shard, so that however shards are dealt to processes, each is made by one."""

    def __init__(self, plan: WindowPlan, runs: list["WindowRun"]) -> None:
        self.plan, self.runs = plan, runs

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> "WindowRun":
        run = self.runs[index]
        here = slice(run.first, run.first + run.windows)
        return WindowRun(run.file, run.split, run.first, run.windows, self.plan.tokens[here], self.plan.document[here])


@dataclass  # not frozen: Lightning refuses frozen ones in batches
class WindowRun:
    """A run of whole windows: the content of one shard. `tokens`, `document`: int32 `[windows, window]`."""

    file: str
    split: str
    first: int
    windows: int
    tokens: Tensor | None = field(default=None, compare=False)
    document: Tensor | None = field(default=None, compare=False)

    def tensors(self) -> dict[str, Tensor]:
        """What the shard holds beside keys and labels: known before any of these is computed."""
        count, length = self.tokens.shape
        return {
            "position": torch.arange(length, dtype=torch.int32).repeat(count),
            "token": self.tokens.flatten(),
            "document": self.document.flatten(),
            "split": torch.full((count * length,), SPLITS.index(self.split), dtype=torch.int32),
        }


def shard_runs(plan: WindowPlan, windows_per_shard: int) -> list[WindowRun]:
    """Cut the plan into shards, each of one split."""
    runs = []
    for index, split in enumerate(SPLITS):
        places = (plan.split == index).nonzero().flatten().tolist()
        for number, start in enumerate(range(0, len(places), windows_per_shard)):
            chosen = places[start : start + windows_per_shard]
            runs.append(WindowRun(f"{split}-{number:05d}.safetensors", split, chosen[0], len(chosen)))
    return runs
