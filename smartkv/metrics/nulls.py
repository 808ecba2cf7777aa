"""Nulls: what predicts a key's lifespan without reading the key. A gate's figure stands beside theirs.

Each learns from training labels and predicts validation labels of the same heads:

* `constant`: the head's mean;
* `position`: a mean per head and place in the window, in 32 bins;
* `token_table`: a mean per head and token id (at layer 0 the pre-RoPE key *is* the token id), the head's mean for a
  token never seen;
* `random`: the label of another training key of the head, drawn at random.

Windows come one by one and none is kept: what a null holds depends on the heads, the tokens and the follow-up, never on
how many keys it has learned from.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from smartkv.labels.lifespans import log4_lifespan
from smartkv.metrics.r2 import RegressionSums
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import RowBlock

NULLS = ("constant", "position", "token_table", "random")


class Null(Protocol):
    """A prediction of log4 lifespan that never sees the key."""

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        """Learn from `target` `[gates, rows]` with `position`, `token` `[rows]`."""

    def predict(self, position: Tensor, token: Tensor, window: int = 0) -> Tensor:
        """-> `[gates, rows]`, float64. `window`: its number, for what is drawn at random."""

    def tensors(self) -> list[Tensor]:
        """All that was learned, as sums: for a reduction over processes in place."""


class TableNull:
    """A mean per head and bin; bins never seen answer the head's mean.

    It holds one float64 number per head and bin, and no copy of them: 0.66 GB for 640 heads and a whole vocabulary of
    128,000. Not float32: the sum of a frequent token grows until what is added to it is lost in rounding.
    """

    def __init__(self, gates: int, bins: int, by: str, width: int = 1) -> None:
        self.by, self.width = by, width
        self.sums = torch.zeros(bins, gates, dtype=torch.float64)  # a key adds to one row: neighbours in memory
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.total = torch.zeros(gates, dtype=torch.float64)

    def _bin(self, position: Tensor, token: Tensor) -> Tensor:
        return {"constant": torch.zeros_like(position), "position": position, "token_table": token}[
            self.by
        ].long() // self.width

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        index, wide = self._bin(position, token), target.double()
        self.sums.index_add_(0, index, wide.T.contiguous())
        self.counts.index_add_(0, index, torch.ones_like(index))
        self.total += wide.sum(dim=1)

    def predict(self, position: Tensor, token: Tensor, window: int = 0) -> Tensor:
        index = self._bin(position, token)
        count = self.counts[index, None]  # of the bins that are asked for: the table is never copied
        mean = torch.where(count > 0, self.sums[index] / count.clamp(min=1), self.total / self.counts.sum())
        return mean.T.contiguous()

    def tensors(self) -> list[Tensor]:
        return [self.sums, self.counts, self.total]


class RandomNull:
    """Draws from the training labels, each head from its own, with replacement.

    Labels are log4 of whole lifespans up to the follow-up. So it counts how often each head had each lifespan, and
    draws a lifespan with that probability: exactly a draw from the pool of all labels, which is not kept. For 640 heads
    and a follow-up of 1,024 that is 5 MB.

    A window's draw depends on the seed and its number alone, whoever scores it and in whichever order.

    Args:
        longest: lifespan in tokens; the follow-up.
    """

    def __init__(self, gates: int, longest: int, seed: int = 0) -> None:
        self.longest, self.seed = longest, seed
        self.counts = torch.zeros(gates, longest + 1, dtype=torch.int64)

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        lifespan = (2 * target.double()).exp2().round_().long()
        self.counts.scatter_add_(1, lifespan, torch.ones_like(lifespan))

    def predict(self, position: Tensor, token: Tensor, window: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        keys = int(self.counts[0].sum())  # the same of every head
        drawn = torch.randint(keys, (len(self.counts), len(token)), generator=generator)
        # of the pool sorted by lifespan: key number `drawn` has the first lifespan up to which there are more keys
        lifespan = torch.searchsorted(self.counts.cumsum(dim=1), drawn, right=True)
        return log4_lifespan(lifespan, self.longest).double()

    def tensors(self) -> list[Tensor]:
        return [self.counts]


def make_nulls(gates: int, window: int, tokens: int, longest: int) -> dict[str, Null]:
    """One of each kind; `tokens`: largest token number + 1, `longest`: lifespan, in tokens."""
    return {
        "constant": TableNull(gates, 1, "constant"),
        "position": TableNull(gates, 32, "position", width=-(-window // 32)),
        "token_table": TableNull(gates, tokens, "token_table"),
        "random": RandomNull(gates, longest),
    }


class _Asked:
    """Numbers for the tokens that `blocks` hold, and one more number for all others."""

    def __init__(self, rows: LabelledKeys, blocks: list[RowBlock]) -> None:
        self.ids = torch.tensor(sorted({token for block in blocks for token in rows.token(block).tolist()}))

    def __len__(self) -> int:
        return len(self.ids) + 1

    def number(self, token: Tensor) -> Tensor:
        place = torch.searchsorted(self.ids, token.long()).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[place] == token, place, len(self.ids))


Watch = Callable[[str, int, Tensor, RowBlock], None]


def score_nulls(
    rows: LabelledKeys,
    watch: Watch = lambda *_: None,
    share: slice = slice(None),
    sum_over_processes: Callable[[Iterable[Tensor]], None] = lambda _: None,
    pooled: bool = False,
) -> dict[str, RegressionSums]:
    """Learn each null on the train windows and score it on the validation windows, window by window.

    The table by token id has a row for each token of the validation windows: no other is asked for.

    Args:
        watch: is shown each null's name, and window, its prediction `[gates, rows]` and the block.
        share: of the windows of either split, those that this process reads.
        sum_over_processes: sums each tensor over the processes that read the others, in place.
        pooled: count all windows as one, so that what is held does not grow with them; there is no interval then.
    """
    train, validation = rows.blocks("train"), rows.blocks("validation")
    asked = _Asked(rows, validation)
    nulls = make_nulls(rows.gates, rows.manifest.window, len(asked), rows.follow_up)
    for block in train[share]:
        target, position, token = rows.target(block), rows.position(block), asked.number(rows.token(block))
        for null in nulls.values():
            null.update(target, position, token)
    sum_over_processes(tensor for null in nulls.values() for tensor in null.tensors())
    scores = {name: RegressionSums.zeros(1 if pooled else len(validation), rows.gates) for name in nulls}
    for window, block in list(enumerate(validation))[share]:
        target, position, token = rows.target(block), rows.position(block), asked.number(rows.token(block))
        for name, null in nulls.items():
            prediction = null.predict(position, token, window)
            scores[name].update(0 if pooled else window, prediction, target)
            watch(name, window, prediction, block)
    sum_over_processes(tensor for sums in scores.values() for tensor in sums.tensors())
    return scores
