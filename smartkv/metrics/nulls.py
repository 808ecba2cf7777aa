"""Nulls: predictors of a key's lifespan that never read the key, reported beside the figures of gates.

Each null learns from training labels and predicts validation labels of the same heads:

* `constant`: the head's mean;
* `position`: a mean per head and position in the window, in 32 bins;
* `token_table`: a mean per head and token id, or the head's mean for a token never seen. At layer 0 the pre-RoPE key
  is a function of the token id;
* `random`: the label of another training key of the head, drawn at random.

Windows are read one by one and not kept. The memory of a null depends on the numbers of heads and tokens and on the
follow-up, but not on how many keys it has learned from.
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
    """A predictor of log4 lifespan that never reads the key."""

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        """Learn from rows.

        Args:
            target: log4 lifespans, `[gates, rows]`.
            position: Positions in the window, `[rows]`.
            token: Token numbers, `[rows]`.
        """

    def predict(self, position: Tensor, token: Tensor, window: int = 0) -> Tensor:
        """Predict log4 lifespans.

        Args:
            position: Positions in the window, `[rows]`.
            token: Token numbers, `[rows]`.
            window: Number of the window, which seeds random draws.

        Returns:
            float64 `[gates, rows]`.
        """

    def tensors(self) -> list[Tensor]:
        """Return all that was learned, as sums to be reduced over processes in place."""


class TableNull:
    """A mean per head and bin, with the head's mean for bins never seen.

    The table has one float64 number per head and bin and is never copied: 0.66 GB for 640 heads and a vocabulary of
    128,000. In float32 the sum of a frequent token would grow until additions are lost in rounding.

    Args:
        gates: Number of heads.
        bins: Number of bins.
        by: What a bin is made of: "constant" (one bin), "position" or "token_table".
        width: Number of positions or tokens per bin.
    """

    def __init__(self, gates: int, bins: int, by: str, width: int = 1) -> None:
        self.by, self.width = by, width
        self.sums = torch.zeros(bins, gates, dtype=torch.float64)  # bins first: a key adds to contiguous memory
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.total = torch.zeros(gates, dtype=torch.float64)

    def _bin(self, position: Tensor, token: Tensor) -> Tensor:
        return {"constant": torch.zeros_like(position), "position": position, "token_table": token}[
            self.by
        ].long() // self.width

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        """Add targets to the sums of their bins."""
        index, target64 = self._bin(position, token), target.double()
        self.sums.index_add_(0, index, target64.T.contiguous())
        self.counts.index_add_(0, index, torch.ones_like(index))
        self.total += target64.sum(dim=1)

    def predict(self, position: Tensor, token: Tensor, window: int = 0) -> Tensor:
        """Look up the means of the bins."""
        index = self._bin(position, token)
        count = self.counts[index, None]  # only the bins asked for, so that the table is never copied
        mean = torch.where(count > 0, self.sums[index] / count.clamp(min=1), self.total / self.counts.sum())
        return mean.T.contiguous()

    def tensors(self) -> list[Tensor]:
        """Return the sums and counts themselves."""
        return [self.sums, self.counts, self.total]


class RandomNull:
    """Random draws from each head's training labels, with replacement.

    Labels are log4 of whole lifespans up to the follow-up. The null counts how often each head had each lifespan and
    draws a lifespan with that probability. This equals a draw from the pool of all labels, which is not kept. For 640
    heads and a follow-up of 1,024 the counts take 5 MB.

    The draw of a window depends on the seed and the window's number alone, so that it is the same in any order and
    process.

    Args:
        gates: Number of heads.
        longest: Longest lifespan in tokens, which is the follow-up.
        seed: Seed of the draws.
    """

    def __init__(self, gates: int, longest: int, seed: int = 0) -> None:
        self.longest, self.seed = longest, seed
        self.counts = torch.zeros(gates, longest + 1, dtype=torch.int64)

    def update(self, target: Tensor, position: Tensor, token: Tensor) -> None:
        """Count lifespans."""
        lifespan = (2 * target.double()).exp2().round_().long()
        self.counts.scatter_add_(1, lifespan, torch.ones_like(lifespan))

    def predict(self, position: Tensor, token: Tensor, window: int = 0) -> Tensor:
        """Draw a label for every row."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        keys = int(self.counts[0].sum())  # every head has as many
        drawn = torch.randint(keys, (len(self.counts), len(token)), generator=generator)
        # In the pool sorted by lifespan, key number `drawn` has the first lifespan whose cumulative count exceeds it.
        lifespan = torch.searchsorted(self.counts.cumsum(dim=1), drawn, right=True)
        return log4_lifespan(lifespan, self.longest).double()

    def tensors(self) -> list[Tensor]:
        """Return the counts themselves."""
        return [self.counts]


def make_nulls(gates: int, window: int, tokens: int, longest: int) -> dict[str, Null]:
    """Make one null of each kind.

    Args:
        gates: Number of heads.
        window: Tokens per window.
        tokens: Largest token number + 1.
        longest: Longest lifespan in tokens.

    Returns:
        The nulls by name, as in `NULLS`.
    """
    return {
        "constant": TableNull(gates, 1, "constant"),
        "position": TableNull(gates, 32, "position", width=-(-window // 32)),
        "token_table": TableNull(gates, tokens, "token_table"),
        "random": RandomNull(gates, longest),
    }


class _TokenNumbers:
    """A number for each token id of some row blocks, and one more number for all other ids."""

    def __init__(self, rows: LabelledKeys, blocks: list[RowBlock]) -> None:
        self.ids = torch.tensor(sorted({token for block in blocks for token in rows.token(block).tolist()}))

    def __len__(self) -> int:
        return len(self.ids) + 1

    def number(self, token: Tensor) -> Tensor:
        """Look up the numbers of token ids `[rows]`, int64."""
        index = torch.searchsorted(self.ids, token.long()).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[index] == token, index, len(self.ids))


Watch = Callable[[str, int, Tensor, RowBlock], None]


def score_nulls(
    rows: LabelledKeys,
    watch: Watch = lambda *_: None,
    share: slice = slice(None),
    sum_over_processes: Callable[[Iterable[Tensor]], None] = lambda _: None,
    pooled: bool = False,
) -> dict[str, RegressionSums]:
    """Train each null on the train windows and score it on the validation windows.

    The token table has rows only for the tokens of the validation windows, because no others are looked up.

    Args:
        rows: The labelled keys.
        watch: Called for each null and validation window with the null's name, the window's number, the prediction
            `[gates, rows]` and the row block.
        share: The windows of either split that this process reads.
        sum_over_processes: Sums tensors over all processes, in place.
        pooled: Count all windows as one, so that memory does not grow with them. There is no interval then.

    Returns:
        The sums of each null by name, from which its R² is computed.

    Raises:
        SmartKVError: There are no train or no validation windows.
    """
    train, validation = rows.blocks("train"), rows.blocks("validation")
    numbers = _TokenNumbers(rows, validation)
    nulls = make_nulls(rows.gates, rows.manifest.window, len(numbers), rows.follow_up)
    for block in train[share]:
        target, position, token = rows.target(block), rows.position(block), numbers.number(rows.token(block))
        for null in nulls.values():
            null.update(target, position, token)
    sum_over_processes(tensor for null in nulls.values() for tensor in null.tensors())
    scores = {name: RegressionSums.zeros(1 if pooled else len(validation), rows.gates) for name in nulls}
    for window, block in list(enumerate(validation))[share]:
        target, position, token = rows.target(block), rows.position(block), numbers.number(rows.token(block))
        for name, null in nulls.items():
            prediction = null.predict(position, token, window)
            scores[name].update(0 if pooled else window, prediction, target)
            watch(name, window, prediction, block)
    sum_over_processes(tensor for sums in scores.values() for tensor in sums.tensors())
    return scores
