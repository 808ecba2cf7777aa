"""Nulls: what predicts a key's lifespan without reading the key. A gate's figure stands beside theirs.

Each learns from training labels and predicts validation labels of the same heads:

* `constant`: the head's mean;
* `position`: a mean per head and place in the window, in 32 bins;
* `token_table`: a mean per head and token id (at layer 0 the pre-RoPE key *is* the token id), the head's mean for a
  token never seen;
* `random`: the label of another training key of the head, drawn at random.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from smartkv.rows import LabelledRows
from smartkv.scores import RegressionSums
from smartkv.shards import Block

NULLS = ("constant", "position", "token_table", "random")


class Null(Protocol):
    """A prediction of log4 lifespan that never sees the key."""

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        """Learn from `target` `[gates, rows]` with `position`, `token` `[rows]`."""

    def predict(self, position: Tensor, token: Tensor) -> Tensor:
        """-> `[gates, rows]`, float64."""


class TableNull:
    """A mean per head and bin; bins never seen answer the head's mean."""

    def __init__(self, gates: int, bins: int, by: str, width: int = 1) -> None:
        self.by, self.width = by, width
        self.sums = torch.zeros(gates, bins, dtype=torch.float64)
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def _bin(self, position: Tensor, token: Tensor) -> Tensor:
        return {"constant": torch.zeros_like(position), "position": position, "token_table": token}[
            self.by
        ].long() // self.width

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        index = self._bin(position, token)
        self.sums.index_add_(1, index, target.double())
        self.counts.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))

    def predict(self, position: Tensor, token: Tensor) -> Tensor:
        overall = self.sums.sum(dim=1, keepdim=True) / self.counts.sum()
        table = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), overall)
        return table[:, self._bin(position, token)]


class RandomNull:
    """Draws from the training labels, each head from its own."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.targets: list[Tensor] = []

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        self.targets.append(target)

    def predict(self, position: Tensor, token: Tensor) -> Tensor:
        pool = torch.cat(self.targets, dim=1)
        index = torch.randint(pool.shape[1], (len(pool), len(token)), generator=self.generator)
        return pool.gather(1, index).double()


def make_nulls(gates: int, window: int, vocabulary: int) -> dict[str, Null]:
    """One of each kind; `vocabulary`: largest token id + 1."""
    return {
        "constant": TableNull(gates, 1, "constant"),
        "position": TableNull(gates, 32, "position", width=-(-window // 32)),
        "token_table": TableNull(gates, vocabulary, "token_table"),
        "random": RandomNull(),
    }


Watch = Callable[[str, int, Tensor, Block], None]


def score_nulls(rows: LabelledRows, watch: Watch = lambda *_: None) -> dict[str, RegressionSums]:
    """Learn each null on the train windows and score it on the validation windows, window by window.

    Args:
        watch: is shown each null's name, and window, its prediction `[gates, rows]` and the block.
    """
    train, validation = rows.blocks("train"), rows.blocks("validation")
    vocabulary = 1 + max(int(rows.token(block).max()) for block in train + validation)
    nulls = make_nulls(rows.gates, rows.manifest.window, vocabulary)
    for block in train:
        target, position, token = rows.target(block), rows.position(block), rows.token(block)
        for null in nulls.values():
            null.update(target, position, token)
    scores = {name: RegressionSums.zeros(len(validation), rows.gates) for name in nulls}
    for window, block in enumerate(validation):
        target, position, token = rows.target(block), rows.position(block), rows.token(block)
        for name, null in nulls.items():
            prediction = null.predict(position, token)
            scores[name].update(window, prediction, target)
            watch(name, window, prediction, block)
    return scores
