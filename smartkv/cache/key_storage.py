"""Storage of one layer's keys, with two write paths.

* `chunk` (prefill): many tokens at once, of which `QUERIES` attend together. Keys that no later query sees are freed
  after each of these, and only live keys are left.
* `step` (decode): one token a row. Keys lie in pages with spare slots. When those are used up, `free_dead` frees dead
  keys and packs the rest anew. Until then a dead key is hidden, so no logit depends on when it is freed.
"""

import torch
from torch import Tensor

from smartkv.cache.chunk_attention import chunk_attention
from smartkv.cache.footprint_count import FootprintCount, count_queries
from smartkv.cache.paged import MAX_SPARE, Pages, spare_tokens
from smartkv.cache.ragged import Fields, Ragged, storage_bytes
from smartkv.policies.capacity import Cap
from smartkv.policies.lifetimes import FOREVER, HOLE
from smartkv.quantization.per_token import Bits, PackedRows

QUERIES = 256  # of a chunk that attend together: fewer skip more dead keys, and move the living ones more often


class KeyStorage:
    """Keys and values of one layer, freed and packed on demand.

    Args:
        shortest_life: tokens that every key is seen for at least.
        cap: of this layer; None: none.
        first_query: position of the first query that `count` counts.
        bits: see `PackedRows`; None: keys and values stay in the model's dtype.

    Attributes:
        store: the keys, between two calls.
        unjudged: pre-RoPE keys `[batch, kv_heads, 1, head_dim]` of the single tokens that came since keys were packed.
        pending: how many tokens that are.
        seen: int64 `[batch]`, real tokens when keys were packed; `columns`: tokens so far, padding included.
        count: keys that the queries before `seen` saw.
        sliding_window: keys that a full cache would hold at most.
        resting: bytes when keys were last moved.
        at_work: bytes of this layer at the fullest moment of the last call; 0 where that moved no keys.
    """

    is_initialized = False
    store: Ragged | Pages
    seen: Tensor
    count: FootprintCount

    def __init__(
        self, shortest_life: int = 1, cap: Cap | None = None, first_query: int = 0, bits: Bits | None = None
    ) -> None:
        super().__init__()
        self.shortest_life, self.cap, self.first_query = shortest_life, cap, first_query
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
        score = torch.empty(0, device=key_states.device) if self.ranked else None
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
        self.count = FootprintCount.zeros(len(seen), self.kv_heads, self.first_query, seen.device)
        self.is_initialized = True
        self.resting = self.storage_bytes

    def set_sliding_window(self, window: int) -> None:
        """The model's own attention sees at most so many keys."""
        self.sliding_window = window
        self.shortest_life = min(self.shortest_life, window)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def storage_bytes(self) -> int:
        """Bytes of all tensors, as allocated: slots (dead or not), positions, expiries, tables, counts, new tokens."""
        if not self.is_initialized:
            return 0
        rest = [
            self.seen,
            self.count.visible,
            self.count.full,
            *self.unjudged,
            self.packed.centre if self.packed else None,
        ]
        return self.store.nbytes + storage_bytes(rest)

    @property
    def exact_bytes(self) -> int:
        """Those of keys and values in the model's dtype, waiting ones included; packed ones are not."""
        if not self.is_initialized:
            return 0
        stored = [] if self.packed is not None else self.store.fields[:2]
        return storage_bytes([*stored, *self.unjudged])

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

    def counted(self) -> FootprintCount:
        """`count` with the queries that came since keys were packed."""
        return self._counted(self._ends(self.pending), self.store.pair()) if self.pending else self.count

    def _counted(self, ends: Tensor, pair: Tensor) -> FootprintCount:
        """The same, from when each slot's key ends and the pair of each slot."""
        after = self.seen + self.pending
        start, end = self._of_pairs(self.seen), self._of_pairs(after)
        saw = count_queries(self.store.fields.position, ends, start[pair], end[pair], self.first_query)
        visible = torch.zeros_like(start).index_add_(0, pair, saw)
        return self.count.plus(visible, self.seen, after, self.sliding_window)

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
    def ranked(self) -> bool:
        """Whether keys are stored with a score, because the layer's heads share a cap."""
        return self.cap is not None and self.cap.heads > 1

    @property
    def ready(self) -> bool:
        """Whether `step` can be called; `settle(…, pack=True)` makes it so."""
        return isinstance(self.store, Pages) and self.pending < self.store.spare

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

    def free_dead(self, expiry: Tensor | None, score: Tensor | None, pack: bool) -> None:
        """Free what died since keys were packed.

        Args:
            expiry: int64 `[batch, kv_heads, pending]` of the tokens that came since; None where none came.
            score: float32, shaped alike; None: not needed.
            pack: as in `settle`.
        """
        old, old_bytes = self.store, self.storage_bytes
        if expiry is not None:
            old.judge(expiry.flatten(0, 1), None if score is None else score.flatten(0, 1))  # type: ignore[union-attr]
        ends, pair = self._ends(self.pending + min(MAX_SPARE, self.shortest_life)), old.pair()
        self.count = self._counted(ends, pair)
        self.seen, self.pending, self.unjudged = self.seen + self.pending, 0, []
        now, position = self._of_pairs(self.seen), old.fields.position
        alive = (position != HOLE) & (position < now[pair]) & (ends > now[pair])
        live = alive.nonzero().flatten()
        counts = torch.bincount(pair[live], minlength=len(now))
        if pack:
            spare = spare_tokens(len(live) / len(counts), self.shortest_life)
            ages = (ends - now[pair])[live]
            self.store = Pages(old.fields, live, counts, ages, now, spare, self.dtype, self.packed)
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
            self.first_query,
            self.packed,
            padded=real is not None,
        )
        self.at_work = self.storage_bytes + done.bytes_at_work
        self.count = self.count.plus(done.visible, self.seen, after, self.sliding_window)
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
        self.seen, self.count = self.seen.index_select(0, rows), self.count.select(rows)
        self.resting = self.storage_bytes
        self.at_work = old_bytes + self.resting
