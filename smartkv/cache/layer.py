"""What one layer of a LifespanCache holds, and its two ways of taking tokens in.

* `chunk`: many tokens at once, of which `QUERIES` attend together. What no later query sees is freed after each of
  these, and nothing else is left.
* `step`: one token a row. Keys lie in blocks with some spare slots; when those are used up, what has died meanwhile is
  freed and the rest is packed anew (`settle`). A dead key that still lies there is hidden, so no logit tells.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from smartkv.cache.chunk_attention import chunk_attention, queries_that_saw
from smartkv.cache.paged import MOST_SPARE, Blocks, spare_tokens
from smartkv.cache.ragged import Fields, Ragged, storage_bytes
from smartkv.policies.capacity import Cap
from smartkv.policies.lifetimes import FOREVER, HOLE
from smartkv.quantization.per_token import Bits, PackedRows

QUERIES = 256  # of a chunk that attend together: fewer skip more dead keys, and move the living ones more often


class LifespanLayer(CacheLayerMixin):
    """What one layer holds.

    Args:
        shortest_life: tokens that every key is seen for at least.
        cap: of this layer; None: none.
        count_from: position of the first query that is counted in `visible` and `held`.
        bits: see `PackedRows`; None: keys and values stay in the model's dtype.

    Attributes:
        store: the keys, between two calls.
        unjudged: pre-RoPE keys `[batch, kv_heads, 1, head_dim]` of the single tokens that came since keys were packed.
        pending: how many tokens that are.
        seen: int64 `[batch]`, real tokens when keys were packed; `columns`: tokens so far, padding included.
        visible, held: int64 `[batch, kv_heads]` and `[batch]`: keys that the counted queries before `seen` saw, and
            those that a full cache would have held for them.
        sliding_window: keys that a full cache would hold at most.
        resting: bytes when keys were last moved.
        at_work: bytes of this layer at the fullest moment of the last call.
    """

    is_sliding = False
    store: Ragged | Blocks
    seen: Tensor
    visible: Tensor
    held: Tensor

    def __init__(
        self, shortest_life: int = 1, cap: Cap | None = None, count_from: int = 0, bits: Bits | None = None
    ) -> None:
        super().__init__()
        self.shortest_life, self.cap, self.count_from = shortest_life, cap, count_from
        self.packed = None if bits is None else PackedRows(bits)
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.is_initialized = False
        self.__dict__.pop("store", None)
        if self.packed is not None:
            self.packed.centre = None
        self.unjudged: list[Tensor] = []
        self.columns = self.pending = self.at_work = self.resting = 0
        self.sliding_window = FOREVER

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty storage. Both `[batch, kv_heads, tokens, head_dim]`."""
        batch, self.kv_heads, _, head_dim = key_states.shape
        position = torch.empty(0, dtype=torch.int32, device=key_states.device)
        score = torch.empty(0, device=key_states.device) if self.cap and self.cap.heads > 1 else None
        keys, values = key_states.new_empty(0, head_dim), value_states.new_empty(0, head_dim)
        if self.packed is not None:
            keys, values = (keys.new_empty(0, n, dtype=torch.uint8) for n in self.packed.row_bytes(head_dim))
        counts = torch.zeros(batch * self.kv_heads, dtype=torch.int64, device=key_states.device)
        store = Ragged(Fields(keys, values, position, position.clone(), score), counts)
        self.restore(store, counts.new_zeros(batch), key_states.dtype)

    def restore(self, store: Ragged, seen: Tensor, dtype: torch.dtype) -> None:
        """Hold `store`, after `seen` real tokens of each row (int64 `[batch]`), for a model of that dtype."""
        self.store, self.seen, self.dtype = store, seen, dtype
        self.kv_heads = len(store.counts) // len(seen)
        self.visible, self.held = store.counts.new_zeros(len(seen), self.kv_heads), torch.zeros_like(seen)
        self.is_initialized = True
        self.resting = self.storage_bytes

    def begin_sliding(self, window: int) -> None:
        """The model's own attention sees at most so many keys."""
        self.sliding_window = window
        self.shortest_life = min(self.shortest_life, window)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def storage_bytes(self) -> int:
        """Bytes of all tensors, as allocated: slots (dead or not), positions, expiries, tables, counts, new tokens."""
        if not self.is_initialized:
            return 0
        rest = [self.seen, self.visible, self.held, *self.unjudged, self.packed.centre if self.packed else None]
        return self.store.nbytes + storage_bytes(rest)

    @property
    def exact_bytes(self) -> int:
        """Those of keys and values in the model's dtype, waiting ones included; packed ones are not."""
        if not self.is_initialized:
            return 0
        held = [] if self.packed is not None else self.store.fields[:2]
        return storage_bytes([*held, *self.unjudged])

    @property
    def bytes_since_moved(self) -> int:
        """The same, from what was counted when keys were last moved and the size of a new token: asked often."""
        return self.resting + (len(self.unjudged) * storage_bytes(self.unjudged[:1]) if self.unjudged else 0)

    @property
    def live(self) -> Tensor:
        """Keys that are not expired, int64 `[batch, kv_heads]`."""
        return self.store.live(self.pending).view(-1, self.kv_heads)

    @property
    def slots(self) -> Tensor:
        """Slots that are stored, live or not, int64 `[batch, kv_heads]`."""
        return self.store.slots.view(-1, self.kv_heads)

    def counted(self) -> tuple[Tensor, Tensor]:
        """`visible` and `held` of all queries so far."""
        if not self.pending:
            return self.visible, self.held
        return self._count(self._ends(self.pending), self.store.pair())

    def _count(self, ends: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the `pending` queries, from when each slot's key ends and the pair of each slot."""
        start, end = self._of_pairs(self.seen), self._of_pairs(self.seen + self.pending)
        seen = queries_that_saw(self.store.fields.position, ends, start[pair], end[pair], self.count_from)
        visible = torch.zeros_like(start).index_add_(0, pair, seen).view(self.visible.shape)
        return self.visible + visible, self.held + self._held(self.seen, self.seen + self.pending)

    def _held(self, start: Tensor, end: Tensor) -> Tensor:
        """Keys that a full cache would have held for the counted queries `start ≤ i < end`, int64 `[batch]`."""

        def until(query: Tensor) -> Tensor:  # Σ min(i + 1, sliding window) over i < query
            growing = query.clamp(max=self.sliding_window)
            return growing * (growing + 1) // 2 + (query - growing) * self.sliding_window

        return until(end) - until(torch.minimum(start.clamp(min=self.count_from), end))

    def _of_pairs(self, rows: Tensor) -> Tensor:
        """`[batch]` -> `[pairs]`."""
        return rows.repeat_interleave(self.kv_heads)

    def _ends(self, queries: int) -> Tensor:
        """First position whose query does not see the key in each slot, drops by a cap included that come up to so
        many queries after `seen`; int `[slots]`."""
        fields = self.store.fields
        if self.cap is None or not len(fields.position):
            return fields.expiry
        index, filled = self.store.side_by_side()
        position = fields.position[index].masked_fill(~filled, HOLE)
        score = None if fields.score is None else fields.score[index]
        ends = self.cap.ends(position, fields.expiry[index], score, self._of_pairs(self.seen), queries)
        flat = fields.expiry.long()
        flat[index[filled]] = ends[filled]
        return flat

    # -- one token a row ----------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether it holds live keys alone, as a chunk leaves it."""
        return isinstance(self.store, Ragged)

    @property
    def ready(self) -> bool:
        """Whether `step` can be called; `settle(…, pack=True)` makes it so."""
        return isinstance(self.store, Blocks) and self.pending < self.store.spare

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Add one token a row; its attention.

        Args:
            query: `[batch, query_heads, 1, head_dim]`; key, value: `[batch, kv_heads, 1, head_dim]`.

        Returns:
            Like `query`.
        """
        pairs, head_dim = len(self.store.counts), key.shape[-1]
        grouped, key, value = query.reshape(pairs, -1, head_dim), key.reshape(pairs, -1), value.reshape(pairs, -1)
        if self.packed is not None:
            grouped, key, value = self.packed.enter(grouped, key[:, None], value[:, None])
            key, value = key[:, 0], value[:, 0]
        self.store.write(self.pending, key, value)  # type: ignore[union-attr]
        output = self.store.attend(grouped, scaling)  # type: ignore[union-attr]
        if self.packed is not None:
            output = self.packed.turn_back(output)
        self.pending += 1
        self.columns += 1
        return output.reshape(query.shape)

    def settle(self, expiry: Tensor | None, score: Tensor | None, pack: bool) -> None:
        """Free what died since keys were packed.

        Args:
            expiry: int64 `[batch, kv_heads, pending]` of the tokens that came since; None where none came.
            score: float32, shaped alike; None: not needed.
            pack: make room for single tokens; else keep the keys and nothing beside them.
        """
        old, old_bytes = self.store, self.storage_bytes
        if expiry is not None:
            old.judge(expiry.flatten(0, 1), None if score is None else score.flatten(0, 1))  # type: ignore[union-attr]
        ends, pair = self._ends(self.pending + min(MOST_SPARE, self.shortest_life)), old.pair()
        self.visible, self.held = self._count(ends, pair)
        self.seen, self.pending, self.unjudged = self.seen + self.pending, 0, []
        now, position = self._of_pairs(self.seen), old.fields.position
        alive = (position != HOLE) & (position < now[pair]) & (ends > now[pair])
        live = alive.nonzero().flatten()
        counts = torch.bincount(pair[live], minlength=len(now))
        if pack:
            spare = spare_tokens(len(live) / len(counts), self.shortest_life)
            ages = (ends - now[pair])[live]
            self.store = Blocks(old.fields, live, counts, ages, now, spare, self.dtype, self.packed)
        else:
            self.store = Ragged(old.fields.at(live), counts)
        self.resting = self.storage_bytes
        self.at_work = old_bytes + self.resting
        if pack and self.packed is not None:  # what each step reads is unpacked for it
            width = self.packed.head_dim(self.store.fields.key.shape[-1]) * self.dtype.itemsize
            self.at_work = max(self.at_work, self.resting + 2 * int(self.store.slots.sum()) * width)

    # -- many tokens --------------------------------------------------------------------------------------------------

    def chunk(self, query: Tensor, new: Fields, real: Tensor | None, scaling: float) -> Tensor:
        """Add the tokens of a chunk to a settled layer; their attention.

        Args:
            query: `[batch, query_heads, tokens, head_dim]`.
            new: the chunk's keys, `[pairs, tokens]`; position `HOLE` where the token is padding.
            real: bool `[batch, tokens]`, False for padding; None: no padding.
            scaling: of the scores.

        Returns:
            Like `query`; zeros for padding.
        """
        if not isinstance(self.store, Ragged):
            raise RuntimeError("settle the layer before a chunk")
        if self.packed is not None:
            padding = new.position == HOLE if real is not None else None
            query, key, value = self.packed.enter(query, new.key, new.value, padding)
            new = new._replace(key=key, value=value)
        outputs, most = [], 0
        for first in range(0, query.shape[2], QUERIES):
            here = slice(first, first + QUERIES)
            part, there = new.map(lambda tensor: tensor[:, here]), None if real is None else real[:, here]  # noqa: B023
            outputs.append(self._take_in(query[:, :, here], part, there, scaling))
            most = max(most, self.at_work)
        self.at_work = most + sum(tensor.nbytes for tensor in new if tensor is not None)  # some are views of more
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return output if self.packed is None else self.packed.turn_back(output)

    def _take_in(self, query: Tensor, new: Fields, real: Tensor | None, scaling: float) -> Tensor:
        """`chunk` of so many tokens that they attend together."""
        tokens = query.shape[2]
        after = self.seen + (tokens if real is None else real.sum(dim=1))
        start, end = self._of_pairs(self.seen), self._of_pairs(after)
        done = chunk_attention(
            query,
            self.store,  # type: ignore[arg-type]
            new,
            self.cap,
            start,
            end,
            scaling,
            self.count_from,
            self.packed,
            padded=real is not None,
        )
        self.at_work = self.storage_bytes + done.bytes_at_work
        self.visible = self.visible + done.visible.view(self.visible.shape)
        self.held = self.held + self._held(self.seen, after)
        self.store, self.seen = done.store, after
        self.columns += tokens
        self.resting = self.storage_bytes
        return done.output

    # -- rows ---------------------------------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 `[rows]`; the layer is settled."""
        if not self.is_initialized:
            return
        if not isinstance(self.store, Ragged):
            raise RuntimeError("settle the layer before its rows are chosen")
        old_bytes = self.storage_bytes
        pairs = rows[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=rows.device)
        self.store = self.store.select(pairs.flatten())
        if self.packed is not None:
            self.packed.select(pairs.flatten())
        self.seen, self.visible, self.held = (t.index_select(0, rows) for t in (self.seen, self.visible, self.held))
        self.resting = self.storage_bytes
        self.at_work = old_bytes + self.resting

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Nothing is stored here: the attention function does."""
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        """Logical length: tokens so far, freed ones and padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, offset) of a mask; none is built."""
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # 5.2 hands the positions
        return self.columns + tokens, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.2
