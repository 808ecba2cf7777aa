"""CacheBudget: how many keys each layer of a cache may hold, from what a user plans and how long the text will be."""

import torch
from torch import Tensor

from smartkv.cache.paged import page_size, spare_tokens
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture
from smartkv.policies.floating_price import MOVES, FloatingPrice
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.planned_budget import Budget, divide, layer_weights
from smartkv.quantization.per_token import Bits, PackedRows

USUAL_PLAN = 2048  # tokens; only the layers' shares depend on it, where max_tokens or max_bytes come without a plan
LARGEST = 2**40  # keys; no layer holds so many
LAYER_BYTES, ROW_BYTES, PAIR_BYTES = 64, 48, 32  # of what is stored beside the keys: positions, counts, budgets, prices
INDEX_BYTES = 8  # of an int64


class CacheBudget:
    """The budget of a cache, and its division among layers.

    Args:
        budget: what the user plans.
        architecture: of the model.
        gates: the model's gates.
        policy: whose gated layers have a floating price.
        bits: of packed keys and values; None: they are not packed.
        dtype: of the model.
        pinned: keys a head that stay whatever their worth, sinks and window excluded, as far as is known yet.
        rollback: tokens for which keys stay longer, hidden.

    Attributes:
        prices: the floating price of each layer, None where the policy keeps the same at any price.

    Raises:
        SmartKVError: no layer has a floating price, or the budget is below what always stays.
    """

    def __init__(
        self,
        budget: Budget,
        architecture: Architecture,
        gates: GateBank | None,
        policy: HybridPolicy,
        bits: Bits | None,
        dtype: torch.dtype,
        pinned: int = 0,
        rollback: int = 0,
    ) -> None:
        self.rollback = rollback
        self.budget, self.architecture, self.gates, self.policy, self.bits = budget, architecture, gates, policy, bits
        self.rules = policy.rules_for(architecture.layers, architecture.sliding_windows)
        ages = gates.ages if gates is not None else ()
        self.prices = [
            FloatingPrice(ages, architecture.kv_heads, rule.window or 1) if rule.rule == "gated" else None
            for rule in self.rules
        ]
        if not any(self.prices):
            raise SmartKVError(
                f"policy '{policy.name}' asks no gates, so nothing in it can be moved to hold {budget}: "
                "give gates and leave out policy, or give windows that keep so much"
            )
        self.dtype = dtype
        if not self.needs_plan:
            self.keys_by_layer(budget.plan, pinned, 1)

    @property
    def needs_plan(self) -> bool:
        """Whether the budget is a share of a length that has yet to be known."""
        return self.budget.footprint is not None and self.budget.plan is None

    def keys_by_row(self, lengths: list[int], pinned: int) -> list[Tensor | None]:
        """Return how many keys all heads of each layer may hold together, int64 `[rows]`.

        Args:
            lengths: tokens of each row, prompt and answer, as far as they are known.
            pinned: as in `keys_by_layer`.

        Returns:
            One tensor per layer, None where the policy keeps the same at any price.
        """
        planned = {length: length if self.needs_plan else self.budget.plan for length in lengths}
        shares = {length: self.keys_by_layer(plan, pinned, len(lengths)) for length, plan in planned.items()}
        columns = zip(*(shares[length] for length in lengths), strict=True)
        return [None if None in keys else torch.tensor(keys) for keys in columns]

    def keys_by_layer(self, planned: int | None, pinned: int, rows: int) -> list[int | None]:
        """Return how many keys all heads of each layer may hold together, in one row.

        A share of a text that is not planned by the user is never less than what always stays.

        Args:
            planned: tokens of the row, prompt and answer; None: not limited.
            pinned: keys a head that stay whatever their worth, sinks and window excluded.
            rows: of the batch, which share `max_bytes`.

        Returns:
            Keys of each layer, None where the policy keeps the same at any price.

        Raises:
            SmartKVError: the budget is below what always stays.
        """
        heads, layers = self.architecture.kv_heads, range(self.architecture.layers)
        floating = [layer for layer in layers if self.prices[layer] is not None]
        total = heads * self._a_head(planned, rows) * len(layers)
        total -= heads * sum(self._fixed(layer, planned) for layer in layers if layer not in floating)
        length, full = planned or USUAL_PLAN, [LARGEST] * len(layers)
        if planned is not None:
            full = [heads * planned] * len(layers)
        always = [heads * (self.policy.sinks + pinned + self.prices[n].youngest) for n in floating]  # type: ignore[union-attr]
        least = [min(each, full[n]) for each, n in zip(always, floating, strict=True)]
        if self.needs_plan:  # the text is shorter than the user may have thought of
            total = max(total, sum(least))
        if total < sum(least):
            raise SmartKVError(self._too_small(planned, pinned, total / heads / len(floating), max(always) // heads))
        kept = min(1.0, total / (heads * len(floating) * length))
        weights = layer_weights(self.gates, kept, len(layers))
        shares = divide(int(total), [weights[n] for n in floating], least, [full[n] for n in floating])
        by_layer: list[int | None] = [None] * len(layers)
        for layer, share in zip(floating, shares, strict=True):
            by_layer[layer] = share
        return by_layer

    def _a_head(self, planned: int | None, rows: int) -> float:
        """Return how many keys a KV head may hold in one row, mean over all heads of all layers."""
        budget, model = self.budget, self.architecture
        if budget.max_tokens is not None:
            return budget.max_tokens
        if budget.footprint is not None and planned is not None:
            return budget.footprint * model.keys_of_full_cache(planned) / (model.layers * model.kv_heads)
        youngest = min(price.youngest for price in self.prices if price is not None)
        pairs = rows * model.layers * model.kv_heads
        largest = max(0, (budget.max_bytes or 0) - model.layers * (LAYER_BYTES + ROW_BYTES * rows) - PAIR_BYTES * pairs)

        def pair_bytes(keys: int) -> int:
            spare, size = spare_tokens(keys, youngest), page_size(keys)
            # with those of a text between two moves, those that are hidden, and the spare ones of pages
            slots = keys + MOVES + self.rollback + spare + size
            tables = INDEX_BYTES * (2 * (slots // size + 1) + 2 * spare)  # of pages, and of the tokens to come
            return slots * self._slot_bytes() + tables + youngest * model.head_dim * self.dtype.itemsize  # to be judged

        few, many = 0, largest
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if pairs * pair_bytes(middle) <= largest else (few, middle)
        return few

    def _slot_bytes(self) -> int:
        """Return the bytes of a key, its value, and all that is stored about them."""
        width = 2 * self.architecture.head_dim * self.dtype.itemsize
        if self.bits is not None:
            width = sum(PackedRows(self.bits).row_bytes(self.architecture.head_dim))
        ages = len(next(price.ages for price in self.prices if price is not None))
        return width + 4 + 4 + 2 * ages + self.dtype.itemsize  # position, expiry, worth, bias

    def _fixed(self, layer: int, planned: int | None) -> int:
        """Return how many keys a head holds in a layer whose rule is not moved by a price."""
        rule, own = self.rules[layer], (self.architecture.sliding_windows or [None] * self.architecture.layers)[layer]
        lengths = [length for length in (planned, own) if length is not None]
        if rule.window is not None:
            lengths.append(rule.window + self.policy.sinks)
        if not lengths:
            raise SmartKVError(
                f"policy '{self.policy.name}' keeps all keys of layers {rule.layers}, so {self.budget} cannot be held "
                "at any length: give plan=TOKENS, or another policy"
            )
        return min(lengths)

    def _too_small(self, planned: int | None, pinned: int, a_head: float, always: int) -> str:
        """Return what to say about a budget below what always stays."""
        length = "" if self.budget.footprint is None else f" of {planned:,} planned tokens"
        parts = f"{self.policy.sinks} sinks, a window of {always - self.policy.sinks - pinned}"
        parts += f" and {pinned} pinned" if pinned else ""
        return (
            f"{self.budget}{length} leaves {a_head:.0f} keys a KV head, but {always} always stay ({parts}): "
            "give a larger budget" + ("" if self.budget.footprint is None else ", or plan=TOKENS for a longer text")
        )
