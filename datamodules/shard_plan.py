"""Division of a harvest's windows into shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smartkv.shards.manifest import SPLITS
from smartkv.texts.windows import WindowPlan


class WindowRuns(Sequence["WindowRun"]):
    """Sequence of `WindowRun`s with their tokens: one item per shard, so that one process makes all of a shard.

    Args:
        plan: all windows.
        runs: the shards of this sequence, without tokens.
    """

    def __init__(self, plan: WindowPlan, runs: list["WindowRun"]) -> None:
        self.plan, self.runs = plan, runs

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> "WindowRun":  # type: ignore[override]  # no slices
        run = self.runs[index]
        here = slice(run.first, run.first + run.windows)
        return WindowRun(run.file, run.split, run.first, run.windows, self.plan.tokens[here], self.plan.document[here])


@dataclass  # not frozen: Lightning refuses frozen ones in batches
class WindowRun:
    """A run of consecutive whole windows of one split: the content of one shard.

    Attributes:
        file: file name of the shard.
        split: train, validation or test.
        first: index of the first window in the plan.
        windows: number of windows.
        tokens: int32 `[windows, window]`, token ids; None in a list of shards to make.
        document: int32 `[windows, window]`, index of each token's document; None in a list of shards to make.
    """

    file: str
    split: str
    first: int
    windows: int
    tokens: Tensor = field(default=None, compare=False)  # type: ignore[assignment]
    document: Tensor = field(default=None, compare=False)  # type: ignore[assignment]

    def tensors(self) -> dict[str, Tensor]:
        """Return the shard's tensors that need no model: position, token, document and split, int32 `[tokens]` each."""
        count, length = self.tokens.shape
        return {
            "position": torch.arange(length, dtype=torch.int32).repeat(count),
            "token": self.tokens.flatten(),
            "document": self.document.flatten(),
            "split": torch.full((count * length,), SPLITS.index(self.split), dtype=torch.int32),
        }


def shard_runs(plan: WindowPlan, windows_per_shard: int) -> list[WindowRun]:
    """Cut the plan into shards, each of one split.

    Args:
        plan: all windows; those of a split follow one another.
        windows_per_shard: most windows per shard; the last shard of a split may have fewer.

    Returns:
        The shards without their tokens.
    """
    runs = []
    for index, split in enumerate(SPLITS):
        places = (plan.split == index).nonzero().flatten().tolist()
        for number, start in enumerate(range(0, len(places), windows_per_shard)):
            chosen = places[start : start + windows_per_shard]
            runs.append(WindowRun(f"{split}-{number:05d}.safetensors", split, chosen[0], len(chosen)))
    return runs
