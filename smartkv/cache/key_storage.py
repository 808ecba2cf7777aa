"""Storage of one layer's keys and values, with two write paths.

* `chunk` (prefill): many tokens at once, `tile_tokens` of which attend together. After each of these tiles the keys
  that no later query sees are freed, so only live keys are stored.
* `step` (decode): one token per row of the batch, or a few. Keys lie in pages with spare slots. When these are used up,
  `free_dead` frees the dead keys and packs the live ones again. Until then a dead key is hidden, so no logit depends on
  when it is freed.
"""

import torch
from torch import Tensor

from smartkv.cache.chunk_attention import Span
from smartkv.cache.footprint_count import FootprintCount, count_deaths, count_full, count_queries, no_deaths
from smartkv.cache.layer_limit import LayerLimit, Rule
from smartkv.cache.paged import MAX_SPARE, Pages, spare_tokens
from smartkv.cache.ragged import Fields, Ragged, storage_bytes
from smartkv.cache.ragged_chunk_attention import attend_chunk, tile_tokens
from smartkv.cache.ranges import Ranges, decoding_store
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER, HOLE
from smartkv.quantization.per_token import Bits, PackedRows


class KeyStorage:
    """Keys and values of one layer, whose dead keys are freed on demand.

    A *pair* is one row of the batch and one KV head, in the order (row, head). Single tokens that came since keys were
    last packed are *pending*: they are stored and visible, but their expiry is not decided yet.

    Args:
        min_lifetime: number of tokens for which every key is visible.
        limit: lets keys go before they expire: the layer's cap, or its floating price; None: they stay until then.
        first_query: position of the first query that `count` counts.
        bits: of packed keys and values (see `PackedRows`); None: they stay in the model's dtype.
        rollback: number of latest tokens that `crop` may drop. Keys that went within them are hidden, and freed later.

    Attributes:
        store: the keys: `Ragged` after a chunk; between steps `Pages`, or `Ranges` on a GPU.
        pending: number of pending tokens.
        pending_keys: pre-RoPE keys of the pending tokens by call, `[batch, kv_heads, tokens, head_dim]`.
        seen: int64 `[batch]`, real tokens of each row, pending ones excluded.
        final: int64 `[batch]`, position before which deaths are final: no `crop` goes back behind it.
        columns: tokens so far, padding and pending ones included.
        visible_keys: int64 `[batch, kv_heads]`, `visible` of a `FootprintCount`, for the queries of the `seen` tokens.
        deaths: int64 `[ages]`, keys that were freed, by age (see `count_deaths`).
        sliding_window: largest number of keys that a full cache would hold.
        packed: packs keys and values; None: they are not packed.
        resting_bytes: `storage_bytes` when keys were last moved.
        call_peak_bytes: the most bytes of this layer during the last call; 0 if it moved no keys.
    """

    is_initialized = False
    store: Ragged | Pages | Ranges
    seen: Tensor
    final: Tensor
    visible_keys: Tensor
    deaths: Tensor

    def __init__(
        self,
        min_lifetime: int = 1,
        limit: Rule | None = None,
        first_query: int = 0,
        bits: Bits | None = None,
        rollback: int = 0,
    ) -> None:
        super().__init__()
        self.rollback = rollback
        self.min_lifetime, self.limit, self.first_query = min_lifetime, LayerLimit(limit), first_query
        self.packed = None if bits is None else PackedRows(bits)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.__dict__.pop("store", None)
        self.limit.budget = None
        if self.packed is not None:
            self.packed.centre = None
        self.pending_keys: list[Tensor] = []
        self.columns = self.pending = self.call_peak_bytes = self.resting_bytes = 0
        self.sliding_window = FOREVER

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create empty storage for keys and values like these, `[batch, kv_heads, tokens, head_dim]`."""
        batch, self.kv_heads, _, head_dim = key_states.shape
        position = torch.empty(0, dtype=torch.int32, device=key_states.device)
        keys, values = key_states.new_empty(0, head_dim), value_states.new_empty(0, head_dim)
        if self.packed is not None:
            keys, values = (keys.new_empty(0, n, dtype=torch.uint8) for n in self.packed.row_bytes(head_dim))
        counts = torch.zeros(batch * self.kv_heads, dtype=torch.int64, device=key_states.device)
        scores = self.limit.no_scores(key_states.device)
        store = Ragged(Fields(keys, values, position, position.clone(), scores), counts)
        self.restore(store, counts.new_zeros(batch), key_states.dtype)

    def restore(self, store: Ragged, seen: Tensor, dtype: torch.dtype) -> None:
        """Take over stored keys.

        Args:
            store: the keys.
            seen: int64 `[batch]`, real tokens of each row so far.
            dtype: of the model.
        """
        self.store, self.seen, self.final, self.dtype = store, seen, seen.clone(), dtype
        self.kv_heads = len(store.counts) // len(seen)
        self.visible_keys = seen.new_zeros(len(seen), self.kv_heads)
        self.deaths = no_deaths(seen.device)
        self.limit.start(len(seen), seen.device)
        self.is_initialized = True
        self.resting_bytes = self.storage_bytes

    def set_sliding_window(self, window: int) -> None:
        """Set the number of keys that the model's own attention sees at most."""
        self.sliding_window = window
        self.min_lifetime = min(self.min_lifetime, window)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def storage_bytes(self) -> int:
        """Bytes of all allocated tensors: slots (live or dead), positions, expiries, tables, counts, pending keys."""
        if not self.is_initialized:
            return 0
        centre = self.packed.centre if self.packed else None
        rest = [
            self.seen,
            self.final,
            self.deaths,
            self.visible_keys,
            *self.limit.tensors,
            *self.pending_keys,
            centre,
        ]
        return self.store.nbytes + storage_bytes(rest)

    @property
    def exact_bytes(self) -> int:
        """Bytes of keys and values in the model's dtype, pending keys included, packed ones excluded."""
        if not self.is_initialized:
            return 0
        stored = [] if self.packed is not None else self.store.fields[:2]
        return storage_bytes([*stored, *self.pending_keys])

    @property
    def cached_storage_bytes(self) -> int:
        """`storage_bytes` without visiting all tensors: `resting_bytes` plus the pending keys."""
        if not self.pending_keys:
            return self.resting_bytes
        return self.resting_bytes + self.pending * storage_bytes(self.pending_keys[:1]) // self.pending_keys[0].shape[2]

    @property
    def live(self) -> Tensor:
        """Number of keys that the last query saw and that are not expired, int64 `[batch, kv_heads]`."""
        live = self.store.live(self.pending)
        if self.settled and self.rollback:  # some are hidden
            pair = self.store.pair()
            seen = self._ends(1)[0] > self._of_pairs(self.seen)[pair]
            live = torch.bincount(pair[seen], minlength=len(live))
        return live.view(-1, self.kv_heads)

    @property
    def slots(self) -> Tensor:
        """Number of allocated slots, live or not, int64 `[batch, kv_heads]`."""
        return self.store.slots.view(-1, self.kv_heads)

    def counted(self) -> FootprintCount:
        """Return the keys that the counted queries saw, those of the pending tokens among them."""
        visible = self._visible(self._ends(self.pending)[0], self.store.pair()) if self.pending else self.visible_keys
        return FootprintCount(visible, count_full(self.seen + self.pending, self.first_query, self.sliding_window))

    def _visible(self, ends: Tensor, pair: Tensor) -> Tensor:
        """Return `visible_keys` with the pending tokens added, given each slot's end (see `_ends`) and pair."""
        start = self._of_pairs(self.seen)
        end = start + self.pending
        seen = count_queries(self.store.fields.position, ends, start[pair], end[pair], self.first_query)
        return self.visible_keys + torch.zeros_like(start).index_add_(0, pair, seen).view(self.visible_keys.shape)

    def _of_pairs(self, rows: Tensor) -> Tensor:
        """Repeat a value per row for each KV head: `[batch]` -> `[pairs]`."""
        return rows.repeat_interleave(self.kv_heads)

    def _ends(self, queries: int, lasting: bool = False) -> tuple[Tensor, Tensor]:
        """Return when keys go, and from when on that is not final.

        Args:
            queries: number of queries from `seen` on, within which the limit may let keys go.
            lasting: `commit` of the limit follows.

        Returns:
            The first position whose query does not see the key in each slot, int `[slots]`: its expiry, or earlier if
            the limit lets it go. And the next value of `final`, int64 `[batch]`.
        """
        fields, known = self.store.fields, self.seen + self.pending
        final = torch.maximum(self.final, known - self.rollback)
        if self.limit.rule is None or not len(fields.position):
            return fields.expiry, final
        index, filled = self.store.side_by_side()
        position = fields.position[index].masked_fill(~filled, HOLE)
        score = None if fields.score is None else fields.score[index]
        expiry = fields.expiry[index]
        ends = self.limit.ends(position, expiry, score, self.final, known, final, self._back() + queries)
        if not lasting:
            self.limit.forget()
        flat = fields.expiry.long()
        flat[index[filled]] = ends[filled]
        return flat, final

    def _back(self) -> int:
        """Return how many queries may have seen keys whose deaths are not final."""
        return int((self.seen - self.final).max()) if self.rollback else 0

    # -- decode: a token per row, or a few ----------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether the layer holds live keys only and none is pending, as after a chunk."""
        return isinstance(self.store, Ragged)

    @property
    def spare_slots(self) -> int:
        """Tokens of each row that `step` has room for; `free_dead(…, pack=True)` makes new room."""
        return self.store.spare - self.pending if isinstance(self.store, Pages | Ranges) else 0

    def step(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Store one more token per row or a few, at most `spare_slots`, and compute their attention.

        Args:
            query: `[batch, query_heads, tokens, head_dim]`.
            key, value: `[batch, kv_heads, tokens, head_dim]`.
            softmax: the step from products of queries and keys to probabilities.

        Returns:
            Shaped like `query`.
        """
        pairs, (tokens, head_dim) = len(self.store.counts), key.shape[2:]
        grouped = query.reshape(pairs, -1, tokens, head_dim).transpose(1, 2).flatten(1, 2)  # [pairs, tokens · group, …]
        key, value = key.reshape(pairs, tokens, head_dim), value.reshape(pairs, tokens, head_dim)
        if self.packed is not None:
            grouped, key, value = self.packed.encode(grouped, key, value)
        seen = self.store.write(self.pending, key, value)  # type: ignore[union-attr]
        if softmax.learned_sinks is not None:
            softmax = softmax.of_pairs(torch.arange(pairs, device=key.device), self.kv_heads)
        output = self.store.attend(grouped, softmax, seen)  # type: ignore[union-attr, arg-type]
        if self.packed is not None:
            output = self.packed.rotate_back(output)
        self.pending += tokens
        self.columns += tokens
        return output.unflatten(1, (tokens, -1)).transpose(1, 2).reshape(query.shape)

    def free_dead(self, expiry: Tensor | None, score: Tensor | None, pack: bool) -> None:
        """Free the dead keys.

        Args:
            expiry: int64 `[batch, kv_heads, pending]`, of the pending tokens; None: there are none.
            score: float32 of the same shape; None: the layer stores none.
            pack: whether to pack the live keys into pages with spare slots for `step`; else they are left ragged.
        """
        old, old_bytes = self.store, self.storage_bytes
        if expiry is not None:
            old.judge(expiry.flatten(0, 1), None if score is None else score.flatten(0, 1))  # type: ignore[union-attr]
        (ends, self.final), pair = self._ends(self.pending + min(MAX_SPARE, self.min_lifetime), True), old.pair()
        self.visible_keys = self._visible(ends, pair)
        self.limit.commit()
        self.seen, self.pending, self.pending_keys = self.seen + self.pending, 0, []
        now, position = self._of_pairs(self.seen), old.fields.position
        stored = (position != HOLE) & (position < now[pair])
        alive = stored & (ends > self._of_pairs(self.final)[pair])
        self.deaths = self.deaths + count_deaths(position, ends, stored & ~alive)
        live = alive.nonzero().flatten() if pack or isinstance(old, Ragged | Pages) else old.in_order(alive)
        counts = torch.bincount(pair[live], minlength=len(now))
        if pack:
            spare = spare_tokens(len(live) / len(counts), self.min_lifetime)
            ages = (ends - now[pair])[live]
            self.store = decoding_store(old.fields, live, counts, ages, now, spare, self.dtype, self.packed)
        else:
            self.store = Ragged(old.fields.at(live), counts)
        self.resting_bytes = self.storage_bytes
        self.call_peak_bytes = old_bytes + self.resting_bytes
        if pack and self.packed is not None:  # each step decodes all keys and values
            width = self.packed.head_dim(self.store.fields.key.shape[-1]) * self.dtype.itemsize
            self.call_peak_bytes = max(
                self.call_peak_bytes, self.resting_bytes + 2 * int(self.store.slots.sum()) * width
            )

    # -- prefill: many tokens -----------------------------------------------------------------------------------------

    def chunk(self, query: Tensor, new: Fields, real: Tensor | None, softmax: Softmax) -> Tensor:
        """Store the tokens of a chunk in a settled layer, and compute their attention.

        Args:
            query: `[batch, query_heads, tokens, head_dim]`.
            new: the chunk's keys, `[pairs, tokens]`; their position is `HOLE` where the token is padding.
            real: bool `[batch, tokens]`, False for padding; None: no padding.
            softmax: the step from products of queries and keys to probabilities.

        Returns:
            Shaped like `query`, zeros for padding.
        """
        if not isinstance(self.store, Ragged):
            raise RuntimeError("call free_dead(…, pack=False) before a chunk")
        if self.packed is not None:
            padding = new.position == HOLE if real is not None else None
            query, key, value = self.packed.encode(query, new.key, new.value, padding)
            new = new._replace(key=key, value=value)
        outputs, peak = [], 0
        together = tile_tokens(query.device, self.packed)
        for first in range(0, query.shape[2], together):
            here = slice(first, first + together)
            tile = new.map(lambda tensor: tensor[:, here])  # noqa: B023
            outputs.append(self._attend_tile(query[:, :, here], tile, None if real is None else real[:, here], softmax))
            peak = max(peak, self.call_peak_bytes)
        # nbytes of the tensors and not of their storages, which may be larger
        self.call_peak_bytes = peak + sum(tensor.nbytes for tensor in new if tensor is not None)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return output if self.packed is None else self.packed.rotate_back(output)

    def _attend_tile(self, query: Tensor, new: Fields, real: Tensor | None, softmax: Softmax) -> Tensor:
        """Store and attend to as many tokens of a chunk as attend together; arguments as in `chunk`."""
        tokens = query.shape[2]
        after = self.seen + (tokens if real is None else real.sum(dim=1))
        final = torch.maximum(self.final, after - self.rollback)
        queries = self._back() + tokens + 1

        def limited(position: Tensor, expiry: Tensor, score: Tensor | None) -> Tensor:
            return self.limit.ends(position, expiry, score, self.final, after, final, queries)

        result = attend_chunk(
            query,
            self.store,  # type: ignore[arg-type]
            new,
            limited if self.limit.rule else None,
            Span(*map(self._of_pairs, (self.seen, after, final))),
            softmax,
            self.first_query,
            self.packed,
            padded=real is not None,
        )
        self.call_peak_bytes = self.storage_bytes + result.peak_bytes
        self.visible_keys = self.visible_keys + result.visible.view(self.visible_keys.shape)
        self.deaths = self.deaths + result.deaths
        self.store, self.seen, self.final = result.store, after, final
        self.limit.commit()
        self.columns += tokens
        self.resting_bytes = self.storage_bytes
        return result.output
