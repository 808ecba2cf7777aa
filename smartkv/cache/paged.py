"""Paged storage: keys in small pages with spare slots, for decoding.

A *pair* is one row of the batch and one KV head. Pairs hold different numbers of keys, and none is padded to the
longest. `smartkv.cache.ragged.Ragged` holds the keys of all pairs one after another, as a chunk leaves them. `Pages`
holds the same keys in pages of few slots, each of one pair, with spare slots for the next tokens. Attention of one
query per head, or a few, is then two batched products over all pages, whatever the lengths of the pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.cache.ragged import Fields, ranks, storage_bytes
from smartkv.models.softmax import Softmax
from smartkv.policies.lifetimes import FOREVER, HOLE
from smartkv.quantization.per_token import PackedRows

# at most so many pairs, with on average fewer keys than this, attend faster one by one
FEW_PAIRS, FEW_KEYS = 4, 768
LEAST_SPARE, MAX_SPARE = 16, 64  # smallest and largest number of tokens between two repackings, if keys live as long


class Pages:
    """Keys in pages of `size` slots while tokens come one by one.

    Args:
        fields: the stored tensors `[slots]` from which the keys are copied.
        live: int64 `[keys]`, the slots of `fields` that hold live keys, pair by pair.
        counts: int64 `[pairs]`, live keys of each pair.
        ages: int64 `[keys]`, index of the first of the coming queries that does not see each key; 0 is the next query.
            Keys that are hidden already, for a rollback, have 0 or less.
        now: int64 `[pairs]`, position of the next query.
        spare: number of tokens that can be written before keys must be packed again.
        dtype: of the model.
        packed: packs keys and values in few bits; None: they are not packed.

    Attributes:
        fields: `[pages · size]`. A page belongs to one pair, and the pages of a pair are consecutive.
        bias: `[pages, 1, size]` in the model's dtype: 0 for keys that the last query saw, −inf for all other slots.
        owner: int64 `[pages]`, the pair of each page.
        table: int64 `[pairs, most pages of a pair]`, the pages of each pair. Pairs with fewer pages point to an empty
            page at the end, which exists only if some do.
        new_slots: int64 `[spare, pairs]`, the slots of the coming tokens.
        hidden: int64 `[pairs]`, keys of each pair that no query sees unless the latest tokens are dropped.
    """

    def __init__(
        self,
        fields: Fields,
        live: Tensor,
        counts: Tensor,
        ages: Tensor,
        now: Tensor,
        spare: int,
        dtype: torch.dtype,
        packed: PackedRows | None = None,
    ) -> None:
        pairs, device = len(counts), counts.device
        self.counts, self.spare, self.packed = counts, spare, packed
        self.size = page_size(len(live) / pairs)
        pages = (counts + spare + self.size - 1) // self.size
        first = pages.cumsum(0) - pages
        total, most = int(pages.sum()), int(pages.max())
        self.uneven = total != pairs * most
        place = torch.arange(most, device=device)
        self.table = torch.where(place < pages[:, None], first[:, None] + place, total)
        self.owner = torch.arange(pairs, device=device).repeat_interleave(pages, output_size=total)
        if self.uneven:
            self.owner = torch.cat([self.owner, self.owner.new_zeros(1)])
        # each slot copies a key of `fields`; slots without a key copy any, which position and bias then hide
        pair, rank = ranks(counts, len(live))
        slots = first[pair] * self.size + rank
        source = live[:1].expand(len(self.owner) * self.size).clone() if len(live) else None
        if source is not None:
            source[slots] = live
            self.fields = fields.at(source)
        else:
            self.fields = fields.map(lambda tensor: tensor.new_zeros(len(self.owner) * self.size, *tensor.shape[1:]))
        filled = torch.zeros(len(self.owner) * self.size, dtype=torch.bool, device=device)
        filled[slots] = True
        self.fields.position.masked_fill_(~filled, HOLE)
        self.fields.expiry.masked_fill_(~filled, 0)
        self.bias = torch.zeros(len(filled), dtype=dtype, device=device)
        self.bias.masked_fill_(~filled, float("-inf"))
        hidden = ages <= 0
        self.bias[slots[hidden]] = float("-inf")
        self.hidden = torch.bincount(pair[hidden], minlength=pairs)
        self.bias = self.bias.view(-1, 1, self.size)
        # the coming tokens are visible until they are judged
        steps = torch.arange(spare, device=device)[:, None]
        self.new_slots = first * self.size + counts + steps
        self.fields.position[self.new_slots] = (now + steps).int()
        self.fields.expiry[self.new_slots] = FOREVER
        self._schedule_bias(slots, pair, ages)
        one_by_one = pairs <= FEW_PAIRS and len(live) < FEW_KEYS * pairs and packed is None
        self._pair_views = self._views_by_pair(pages) if one_by_one else []

    def _views_by_pair(self, pages: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return views of each pair's keys and values `[1, 1, slots, head_dim]`, and of its bias `[1, 1, 1, slots]`."""
        sizes = [*(pages * self.size).tolist(), self.size if self.uneven else 0]  # the last is the empty page
        keys, values = (tensor.split(sizes) for tensor in self.fields[:2])
        views = zip(keys, values, self.bias.view(-1).split(sizes), strict=True)
        return [(k[None, None], v[None, None], bias[None, None, None]) for k, v, bias in views][:-1]

    def _schedule_bias(self, slots: Tensor, pair: Tensor, ages: Tensor) -> None:
        """Prepare the changes of `bias` at each step: the new token becomes visible, and expired keys are hidden."""
        dying = ((ages > 0) & (ages < self.spare)).nonzero().flatten()
        self.deaths = torch.bincount(ages[dying] * len(self.counts) + pair[dying], minlength=self.new_slots.numel())
        self.deaths = self.deaths.view(self.new_slots.shape)
        steps = torch.arange(self.spare, device=slots.device).repeat_interleave(len(self.counts))
        step, order = torch.cat([steps, ages[dying]]).sort(stable=True)
        index = torch.cat([self.new_slots.flatten(), slots[dying]])[order]
        value = torch.zeros(len(index), dtype=self.bias.dtype, device=slots.device)
        value[order >= self.new_slots.numel()] = float("-inf")
        sizes = torch.bincount(step, minlength=self.spare).tolist()
        self._bias_changes = list(zip(index.split(sizes), value.split(sizes), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        changes = self._bias_changes[0]  # those of all steps are views of the same two storages
        tables = [self.owner, self.table, self.counts, self.hidden, self.new_slots, self.deaths]
        rest = [self.bias, *tables, *changes]
        return self.fields.nbytes + storage_bytes(rest)

    @property
    def slots(self) -> Tensor:
        """Slots of each pair, live or not, int64 `[pairs]`; the shared empty page counts for the first pair."""
        return torch.bincount(self.owner, minlength=len(self.counts)) * self.size

    def live(self, steps: int) -> Tensor:
        """Return the number of keys that the last of `steps` queries saw, int64 `[pairs]`."""
        return self.counts - self.hidden + steps - self.deaths[:steps].sum(dim=0)

    def write(self, step: int, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values of the next tokens, and hide the keys that their queries do not see.

        Args:
            step: index of the first token since keys were packed, 0 … spare − 1.
            key, value: `[pairs, tokens, head_dim]`, or packed `[pairs, tokens, row bytes]`.

        Returns:
            The bias of each token's query, `[pages, tokens, size]`.
        """
        tokens = key.shape[1]
        self.fields.put(self.new_slots[step : step + tokens], key, value)
        seen = []
        for changes in self._bias_changes[step : step + tokens]:
            self.bias.view(-1).index_copy_(0, *changes)
            seen.append(self.bias if tokens == 1 else self.bias.clone())
        return seen[0] if tokens == 1 else torch.cat(seen, dim=1)

    def take_back(self, start: int, stop: int) -> None:
        """Hide the tokens from `start` to before `stop`, the latest written, and show again what they hid."""
        for slots, value in reversed(self._bias_changes[start:stop]):
            self.bias.view(-1).index_copy_(0, slots, torch.where(value == 0, float("-inf"), 0.0).to(value.dtype))

    def attend(self, query: Tensor, softmax: Softmax, bias: Tensor) -> Tensor:
        """Compute attention of a few queries per head over the keys that they see.

        All pages of a pair subtract the pair's largest score before the exponential, so that their sums can be added.

        Args:
            query: `[pairs, tokens · group, head_dim]`, for each token the query heads of a pair's group.
            softmax: of the pairs, the step from products of queries and keys to probabilities.
            bias: what `write` returned for these tokens.

        Returns:
            Shaped like `query`, in its dtype.
        """
        keys, values = (tensor.view(-1, self.size, tensor.shape[-1]) for tensor in self.fields[:2])
        if self.packed is not None:
            keys, values = self.packed.decode(keys, values, query.dtype, None if softmax.plain else self.owner)
        if self._pair_views and softmax.plain and bias.shape[1] == 1:
            pairs = zip(query.unsqueeze(1).split(1), self._pair_views, strict=True)
            outputs = [
                F.scaled_dot_product_attention(q, k, v, attn_mask=b, scale=softmax.scaling) for q, (k, v, b) in pairs
            ]
            return torch.cat(outputs).squeeze(1)
        queries, keys = query.index_select(0, self.owner), keys.transpose(1, 2)
        tokens = bias.shape[1]
        if tokens > 1:
            bias = bias.repeat_interleave(query.shape[1] // tokens, dim=1)
        if softmax.plain:
            scores = torch.baddbmm(bias, queries, keys, alpha=softmax.scaling)
        else:
            scores = softmax.scores(queries @ keys).add_(bias)
        largest = self._by_pair(scores.amax(dim=-1)).amax(dim=1)  # [pairs, tokens · group]
        if softmax.learned_sinks is not None:
            learned_sinks = softmax.learned_sinks.to(largest.dtype).view(len(largest), -1).repeat(1, tokens)
            largest = torch.maximum(largest, learned_sinks)
        weights = scores.sub_(largest.index_select(0, self.owner)[..., None]).exp_()
        total = self._by_pair(weights.sum(dim=-1, dtype=torch.float32)).sum(dim=1)  # [pairs, tokens · group]
        if softmax.learned_sinks is not None:
            total += (learned_sinks - largest).exp_()
        mixed = self._by_pair(torch.bmm(weights.to(values.dtype), values)).sum(
            dim=1, dtype=torch.float32
        )  # [pairs, tokens · group, head_dim]
        return mixed.div_(total[..., None]).to(query.dtype)

    def _by_pair(self, tensor: Tensor) -> Tensor:
        """Gather the pages of each pair: `[pages, …]` -> `[pairs, most pages of a pair, …]`."""
        if self.uneven:
            tensor = tensor.index_select(0, self.table.view(-1))
        return tensor.view(*self.table.shape, *tensor.shape[1:])

    def judge(self, expiry: Tensor, score: Tensor | None) -> None:
        """Store the decision about the first tokens that came since keys were packed.

        Args:
            expiry: int64 `[pairs, tokens]`.
            score: float32 `[pairs, tokens]`, or None: no score is stored.
        """
        self.fields.judge(self.new_slots[: expiry.shape[1]].T, expiry, score)

    def pair(self) -> Tensor:
        """Return the pair of each slot, int64 `[pages · size]`."""
        return self.owner.repeat_interleave(self.size)

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Return the indices of each pair's slots as a padded table.

        Returns:
            Indices into `fields`, int64 `[pairs, most slots of a pair]`; and a bool mask of the same shape, False for
            padding.
        """
        index = (self.table[..., None] * self.size + torch.arange(self.size, device=self.table.device)).flatten(1)
        return index, self.owner[index // self.size] == torch.arange(len(self.counts), device=index.device)[:, None]


def page_size(keys: float) -> int:
    """Return the slots of a page for pairs of `keys` keys on average.

    A pair wastes half a page on average, which speaks for small pages; many small pages are slow.
    """
    return next((size for size in (16, 32, 64) if keys < 48 * size), 128)


def spare_tokens(keys: float, min_lifetime: int) -> int:
    """Return how many tokens to write before keys are packed again.

    Each packing copies all keys, which speaks for many tokens; until then dead keys stay in memory.

    Args:
        keys: of a pair, on average.
        min_lifetime: number of tokens for which every new key is visible. Before that no new key can die.
    """
    return max(1, min(max(LEAST_SPARE, int(keys) // 16), MAX_SPARE, min_lifetime))
