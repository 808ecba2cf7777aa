"""LayerLimit: what lets keys of one layer go before they expire, and its state for each row of the batch."""

import torch
from torch import Tensor

from smartkv.policies.capacity import Cap
from smartkv.policies.floating_price import FloatingPrice, Prices
from smartkv.policies.lifetimes import HOLE

Rule = Cap | FloatingPrice


class LayerLimit:
    """A layer's cap, or its floating price with the budget and the price of each row; or neither.

    Args:
        rule: the cap or the floating price; None: keys stay until they expire.

    Attributes:
        budget: int64 `[batch]`, keys that the heads of each row may hold together under a floating price; None before
            the first token.
        prices: the floating prices at the position before which deaths are final.
    """

    budget: Tensor | None = None
    prices: Prices
    _coming_prices: Prices | None = None  # of the last call of `ends`, until `commit`

    def __init__(self, rule: Rule | None) -> None:
        self.rule = rule

    @property
    def floats(self) -> bool:
        """Whether the layer has a floating price."""
        return isinstance(self.rule, FloatingPrice)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of a layer that has seen a token."""
        return [] if self.budget is None else [self.budget, *self.prices]

    @property
    def ranked(self) -> bool:
        """Whether keys are stored with a score, because the layer's heads share a cap or a budget."""
        return self.floats or (isinstance(self.rule, Cap) and self.rule.heads > 1)

    def start(self, rows: int, device: torch.device) -> None:
        """Set the price at which everything stays, for `rows` rows."""
        if self.floats:
            self.prices, self._coming_prices = Prices.of(rows, device), None

    def take_over(self, budget: Tensor, prices: Prices) -> None:
        """Go on with the budget int64 `[batch]` and the prices of another layer."""
        self.budget, self.prices, self._coming_prices = budget, prices, None

    def no_scores(self, device: torch.device) -> Tensor | None:
        """Return the scores of no keys: float32 `[0]`, float16 `[0, ages]` under a floating price, None if unranked."""
        if isinstance(self.rule, FloatingPrice):
            return torch.empty(0, len(self.rule.ages), dtype=torch.float16, device=device)
        return torch.empty(0, device=device) if self.ranked else None

    def ends(
        self,
        position: Tensor,
        expiry: Tensor,
        score: Tensor | None,
        start: Tensor,
        known: Tensor,
        until: Tensor,
        queries: int,
    ) -> Tensor:
        """Return the first position whose query does not see each key: its expiry, or earlier by the rule.

        Args:
            position: int `[pairs, keys]`, `HOLE` where there is no key.
            expiry: int `[pairs, keys]`.
            score: `[pairs, keys]` or `[pairs, keys, ages]`, as in `Fields`.
            start: int64 `[batch]`, position of the first query. Keys that went before it are freed.
            known: int64 `[batch]`, position after the last key that is known.
            until: int64 `[batch]`, position at which `commit` takes over the prices.
            queries: number of queries, from `start` on.

        Returns:
            int `[pairs, keys]`.
        """
        if self.rule is None:
            return expiry
        heads = len(position) // len(start)
        if isinstance(self.rule, Cap):
            return self.rule.ends(position, expiry, score, start.repeat_interleave(heads), queries)
        if self.budget is None or score is None:
            raise RuntimeError("set the budget before the first token, and give scores")
        self.budget = self.budget.to(start.device)  # whoever sets it knows no device
        stored = position.masked_fill(position >= known.repeat_interleave(heads)[:, None], HOLE)  # not a spare slot
        deaths = self.rule.ends(stored, expiry, score, start, known, until, queries, self.budget, self.prices)
        self._coming_prices = deaths.prices
        return deaths.ends

    def forget(self) -> None:
        """Forget the price of the last call of `ends`, which only asked."""
        self._coming_prices = None

    def commit(self) -> None:
        """Take over the price of the last call of `ends`, whose deaths have happened."""
        if self._coming_prices is not None:
            self.prices, self._coming_prices = self._coming_prices, None

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 `[rows]`, which may repeat."""
        if self.budget is not None:
            self.prices, self._coming_prices = Prices(*(each.index_select(0, rows) for each in self.prices)), None
            self.budget = self.budget.index_select(0, rows)
