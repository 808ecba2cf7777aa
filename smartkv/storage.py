"""What one layer of a LifespanCache holds: the keys that are alive, and nothing else.

Keys of all rows and KV heads lie in one flat tensor. For a chunk's attention they are put side by side, padded to the
longest head; afterwards the survivors are stored flat again, so nothing dead outlives a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin

HOLE = -1  # position of a slot without a key, while heads of unlike length stand side by side


class LifespanLayer(CacheLayerMixin):
    """What one layer holds.

    Attributes:
        keys, values: `[live, head_dim]` in the order (row, KV head, position), the model's dtype.
        position: int32 `[live]`, each key's place among the real tokens of its row.
        expiry: int32 `[live]`, the first position whose query does not see the key.
        counts: int64 `[batch, kv_heads]`, live keys.
        seen: int64 `[batch]`, real tokens so far; `columns`: tokens so far, padding included.
        visible, held: int64 `[batch, kv_heads]` and `[batch]`: keys that the counted queries saw, and those that a full
            cache would have held for them.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    position: Tensor
    expiry: Tensor
    counts: Tensor
    seen: Tensor
    visible: Tensor
    held: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty storage. Both `[batch, kv_heads, tokens, head_dim]`."""
        batch, kv_heads, _, head_dim = key_states.shape
        self.keys, self.values = key_states.new_empty(0, head_dim), value_states.new_empty(0, head_dim)
        self.position = torch.empty(0, dtype=torch.int32, device=key_states.device)
        self.expiry = self.position.clone()
        self.counts = torch.zeros(batch, kv_heads, dtype=torch.int64, device=key_states.device)
        self.seen = self.counts.new_zeros(batch)
        self.visible, self.held = self.counts.clone(), self.seen.clone()
        self.is_initialized = True

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    @property
    def storage_bytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        if not self.is_initialized:
            return 0
        names = ("keys", "values", "position", "expiry", "counts", "seen")
        return sum(getattr(self, name).untyped_storage().nbytes() for name in names)

    def slots(self) -> list[Tensor]:
        """Keys, values, position and expiry side by side: `[batch, kv_heads, slots, …]`, as many slots as the longest
        head has keys; the others end with slots of position `HOLE`."""
        longest = int(self.counts.max())
        filled = torch.arange(longest, device=self.counts.device) < self.counts[..., None]
        padded = []
        for flat, fill in ((self.keys, 0), (self.values, 0), (self.position, HOLE), (self.expiry, HOLE)):
            slots = flat.new_full((*filled.shape, *flat.shape[1:]), fill)
            slots[filled] = flat
            padded.append(slots)
        return padded

    def keep(self, slots: list[Tensor], alive: Tensor) -> None:
        """Store the slots that are `alive` (bool `[batch, kv_heads, slots]`), and free all else."""
        self.keys, self.values, self.position, self.expiry = (tensor[alive] for tensor in slots)
        self.counts = alive.sum(dim=-1)

    def step(
        self, query: Tensor, new: list[Tensor], scaling: float, count_from: int, window: int
    ) -> tuple[Tensor, int]:
        """Attention of one chunk; its keys are added, and what no later query sees is freed.

        Args:
            query: `[batch, query_heads, tokens, head_dim]`.
            new: the chunk's keys, values `[batch, kv_heads, tokens, head_dim]`, position and expiry
                `[batch, kv_heads, tokens]`; position `HOLE` where the token is padding.
            scaling: of the scores.
            count_from: position of the first query that is counted in `visible` and `held`.
            window: keys that a full cache would hold at most (the model's own sliding window).

        Returns:
            `[batch, query_heads, tokens, head_dim]`, and the bytes of keys, values, position and expiry side by side.
        """
        slots = [torch.cat(pair, dim=2) for pair in zip(self.slots(), new, strict=True)]
        keys, values, position, expiry = slots
        at = new[2][:, :1, :, None]  # positions of the queries, [batch, 1, tokens, 1]
        visible = (position[:, :, None] >= 0) & (position[:, :, None] <= at) & (expiry[:, :, None] > at)
        counted = at >= count_from
        self.visible += (visible & counted).sum(dim=(2, 3))
        self.held += ((at + 1).clamp(max=window) * counted).sum(dim=(1, 2, 3))
        # a query of padding sees nothing: let it see itself, for a softmax over nothing is NaN
        tokens = query.shape[2]
        itself = torch.eye(tokens, dtype=torch.bool, device=query.device) & (at < 0)
        visible[..., -tokens:] |= itself
        output = _grouped_attention(query, keys, values, visible, scaling)
        self.seen = torch.maximum(self.seen, at.amax(dim=(1, 2, 3)) + 1)
        self.keep(slots, (position >= 0) & (expiry > self.seen[:, None, None]))
        return output, sum(tensor.nbytes for tensor in slots)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 `[rows]`."""
        if self.is_initialized:
            slots = [tensor.index_select(0, rows) for tensor in self.slots()]
            self.seen, self.visible, self.held = (t.index_select(0, rows) for t in (self.seen, self.visible, self.held))
            self.keep(slots, slots[2] >= 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search goes on with other rows."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self.select(torch.arange(len(self.seen), device=self.seen.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.select(torch.arange(len(self.seen), device=self.seen.device).repeat_interleave(repeats))

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Nothing is stored here: `step` does, in the attention function."""
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        """Logical length: tokens so far, freed ones and padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, offset) of a mask; only its padding is read."""
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # 5.2 hands the positions
        return self.columns + tokens, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.2


def _grouped_attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Attention in which each KV head has a mask of its own, without repeating keys for the query heads of a group.

    Args:
        query: `[batch, query_heads, tokens, head_dim]`.
        keys, values: `[batch, kv_heads, slots, head_dim]`.
        visible: bool `[batch, kv_heads, tokens, slots]`.
    """
    kv_heads, group = keys.shape[1], query.shape[1] // keys.shape[1]
    grouped = query.unflatten(1, (kv_heads, group)).flatten(2, 3)  # [batch, kv_heads, group · tokens, head_dim]
    mask = visible[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (group, -1)).flatten(1, 2)
