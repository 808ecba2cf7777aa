"""Changes of what one layer holds: pins, the latest tokens, rows of the batch."""

import torch
from torch import Tensor

from smartkv.cache.footprint_count import count_queries
from smartkv.cache.key_storage import KeyStorage
from smartkv.cache.paged import Pages
from smartkv.cache.ragged import Ragged
from smartkv.cache.ranges import Ranges
from smartkv.policies.floating_price import PINNED
from smartkv.policies.lifetimes import FOREVER


class EditableKeys(KeyStorage):
    """Keys and values of one layer that can be changed while the layer is settled, as after a chunk."""

    def visible(self, start: int, stop: int) -> Tensor:
        """Return how many keys of the positions from `start` to before `stop` the next query sees in a settled layer.

        Returns:
            int64 `[batch, kv_heads]`.
        """
        pair, position = self.store.pair(), self.store.fields.position
        here = (position >= start) & (position < stop) & (self._ends(1)[0] > self._of_pairs(self.seen)[pair])
        return torch.bincount(pair[here], minlength=len(self.store.counts)).view(-1, self.kv_heads)

    def missing(self, start: int, stop: int) -> int:
        """Return how many keys of the positions from `start` to before `stop` have gone from a settled layer.

        0 where the model's own window hides keys.
        """
        if self.sliding_window != FOREVER:
            return 0
        came = (self.seen.clamp(max=stop) - start).clamp(min=0)
        return int(self._of_pairs(came).sum() - self.visible(start, stop).sum())

    def pin(self, start: int, stop: int) -> None:
        """Let the keys of these positions stay for good in a settled layer."""
        if not self.is_initialized or self.sliding_window != FOREVER:
            return
        fields = self.store.fields
        here = (fields.position >= start) & (fields.position < stop)
        fields.expiry[here] = FOREVER
        if self.limit.floats and fields.score is not None:
            fields.score[here] = PINNED

    def drop_pending(self, tokens: int) -> None:
        """Forget the latest tokens of each row, all of them pending; their slots take the next ones."""
        if not isinstance(self.store, Pages | Ranges):
            raise RuntimeError("only tokens of `step` are pending")
        self.store.take_back(self.pending - tokens, self.pending)
        self.pending, self.columns = self.pending - tokens, self.columns - tokens
        keys = torch.cat(self.pending_keys, dim=2)[:, :, : self.pending]
        self.pending_keys = [keys.clone()] if self.pending else []

    def drop_latest(self, columns: int, tokens: Tensor) -> None:
        """Forget the latest tokens, as if they had never come. The layer must be settled.

        Args:
            columns: number of latest tokens, padding included.
            tokens: int64 `[batch]`, how many of them are real, at most `seen - final`.
        """
        if not self.is_initialized:
            return
        if not isinstance(self.store, Ragged):
            raise RuntimeError("call free_dead(…, pack=False) before tokens are dropped")
        old_bytes, after = self.storage_bytes, self.seen - tokens
        pair, position = self.store.pair(), self.store.fields.position
        before, now = (self._of_pairs(rows) for rows in (after, self.seen))
        seen = count_queries(position, self._ends(1)[0], before[pair], now[pair], self.first_query)
        visible = torch.zeros_like(now).index_add_(0, pair, seen)
        self.visible_keys = self.visible_keys - visible.view(self.visible_keys.shape)
        stays = (position < before[pair]).nonzero().flatten()
        self.store = Ragged(self.store.fields.at(stays), torch.bincount(pair[stays], minlength=len(now)))
        self.seen, self.columns = after, self.columns - columns
        self.resting_bytes = self.storage_bytes
        self.call_peak_bytes = old_bytes + self.resting_bytes

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 `[rows]`, which may repeat. The layer must be settled."""
        if not self.is_initialized:
            return
        if not isinstance(self.store, Ragged):
            raise RuntimeError("call free_dead(…, pack=False) before rows are selected")
        old_bytes = self.storage_bytes
        pairs = rows[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=rows.device)
        self.store = self.store.select(pairs.flatten())
        if self.packed is not None:
            self.packed.select(pairs.flatten())
        self.seen, self.final = self.seen.index_select(0, rows), self.final.index_select(0, rows)
        self.visible_keys = self.visible_keys.index_select(0, rows)
        self.limit.select(rows)
        self.resting_bytes = self.storage_bytes
        self.call_peak_bytes = old_bytes + self.resting_bytes
