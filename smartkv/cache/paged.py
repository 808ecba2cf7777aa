"""Where keys lie: ragged between forward passes, in blocks while decoding.

A *pair* is one row of the batch and one KV head. Pairs hold unlike numbers of keys, and no pair pays for another's:

* `Ragged`: all pairs' keys one after another, nothing between them. What a chunk leaves.
* `Pages`: the same keys cut into blocks of few slots, each of one pair, with spare slots for the tokens to come.
  Attention of one query a head is two batched products over all blocks, whatever the pairs' lengths.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.cache.ragged import Fields, ranks, storage_bytes
from smartkv.policies.lifetimes import FOREVER, HOLE
from smartkv.quantization.per_token import PackedRows

FEW, SHORT = 4, 768  # so few pairs of so few keys are faster attended to one by one: what counts is the calls
MAX_SPARE = 64  # tokens that are taken in before keys are packed anew


class Pages:
    """Keys in blocks of `size` slots while tokens come one by one.

    Args:
        fields: `[slots]`, from which the keys are taken.
        live: int64 `[keys]`, the slots of `fields` that hold them, pair by pair.
        counts: int64 `[pairs]`, how many each pair has.
        ages: int64 `[keys]`, which of the queries to come is the first that does not see each key; 0 is the next one.
        now: int64 `[pairs]`, position of the next query.
        spare: tokens that may come before the keys are packed anew.
        dtype: of the model.
        rows: how keys and values are packed; None: they are not.

    Attributes:
        fields: `[blocks · size]`. A block belongs to one pair, a pair's blocks follow each other.
        bias: `[blocks, 1, size]`, the model's dtype: 0 for keys that the last query saw, −inf for all other slots.
        owner: int64 `[blocks]`, the pair of each block.
        table: int64 `[pairs, most blocks of a pair]`; shorter pairs point to an empty block at the end.
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
        rows: PackedRows | None = None,
    ) -> None:
        pairs, device = len(counts), counts.device
        self.counts, self.spare, self.rows = counts, spare, rows
        self.size = page_size(len(live) / pairs)
        blocks = (counts + spare + self.size - 1) // self.size
        first = blocks.cumsum(0) - blocks
        total, most = int(blocks.sum()), int(blocks.max())
        self.uneven = total != pairs * most
        place = torch.arange(most, device=device)
        self.table = torch.where(place < blocks[:, None], first[:, None] + place, total)
        self.owner = torch.arange(pairs, device=device).repeat_interleave(blocks, output_size=total)
        if self.uneven:
            self.owner = torch.cat([self.owner, self.owner.new_zeros(1)])
        # each slot takes its key from `fields`; slots without one take any key, and are hidden by position and bias
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
        self.bias = self.bias.view(-1, 1, self.size)
        # where the tokens to come go: [spare, pairs]; they are seen until they are judged
        steps = torch.arange(spare, device=device)[:, None]
        self.coming = first * self.size + counts + steps
        self.fields.position[self.coming] = (now + steps).int()
        self.fields.expiry[self.coming] = FOREVER
        self._plan(slots, pair, ages)
        self._each = self._one_by_one(blocks) if pairs <= FEW and len(live) < SHORT * pairs and rows is None else []

    def _one_by_one(self, blocks: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each pair its keys, values and bias, `[1, 1, slots, head_dim]` and `[1, 1, 1, slots]`."""
        sizes = [*(blocks * self.size).tolist(), self.size if self.uneven else 0]  # the last: the empty block
        keys, values = (tensor.split(sizes) for tensor in self.fields[:2])
        parts = zip(keys, values, self.bias.view(-1).split(sizes), strict=True)
        return [(k[None, None], v[None, None], bias[None, None, None]) for k, v, bias in parts][:-1]

    def _plan(self, slots: Tensor, pair: Tensor, ages: Tensor) -> None:
        """What changes in `bias` at each step: the new token's slot is seen from then on, an expired one is not."""
        dying = ((ages > 0) & (ages < self.spare)).nonzero().flatten()
        self.deaths = torch.bincount(ages[dying] * len(self.counts) + pair[dying], minlength=self.coming.numel())
        self.deaths = self.deaths.view(self.coming.shape)
        steps = torch.arange(self.spare, device=slots.device).repeat_interleave(len(self.counts))
        step, order = torch.cat([steps, ages[dying]]).sort(stable=True)
        index = torch.cat([self.coming.flatten(), slots[dying]])[order]
        value = torch.zeros(len(index), dtype=self.bias.dtype, device=slots.device)
        value[order >= self.coming.numel()] = float("-inf")
        sizes = torch.bincount(step, minlength=self.spare).tolist()
        self._changes = list(zip(index.split(sizes), value.split(sizes), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        planned = self._changes[0]  # of each step a view of one storage
        rest = [self.bias, self.owner, self.table, self.counts, self.coming, self.deaths, *planned]
        return self.fields.nbytes + storage_bytes(rest)

    @property
    def slots(self) -> Tensor:
        """Slots of each pair, live or not; int64 `[pairs]`. The empty block that all share is counted for the first."""
        return torch.bincount(self.owner, minlength=len(self.counts)) * self.size

    def live(self, steps: int) -> Tensor:
        """Keys that the last of `steps` queries saw, int64 `[pairs]`."""
        return self.counts + steps - self.deaths[:steps].sum(dim=0)

    def write(self, step: int, key: Tensor, value: Tensor) -> None:
        """Add the keys of the token at `step` (0 … spare − 1), and hide what its query does not see.

        Args:
            key, value: `[pairs, head_dim]`, or packed.
        """
        slots = self.coming[step]
        self.fields.key.index_copy_(0, slots, key)
        self.fields.value.index_copy_(0, slots, value)
        self.bias.view(-1).index_copy_(0, *self._changes[step])

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of one query a head over the keys that it sees.

        The softmax runs over a pair's blocks: they share its largest score, and are summed at the end.

        Args:
            query: `[pairs, group, head_dim]`.

        Returns:
            The same shape and dtype.
        """
        keys, values = (tensor.view(-1, self.size, tensor.shape[-1]) for tensor in self.fields[:2])
        if self.rows is not None:
            keys, values = self.rows.read(keys, values, query.dtype)
        if self._each:
            parts = zip(query.unsqueeze(1).split(1), self._each, strict=True)
            each = [F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling) for q, (k, v, bias) in parts]
            return torch.cat(each).squeeze(1)
        scores = torch.baddbmm(self.bias, query.index_select(0, self.owner), keys.transpose(1, 2), alpha=scaling)
        largest = self._by_pair(scores.amax(dim=-1)).amax(dim=1)  # [pairs, group]
        weights = scores.sub_(largest.index_select(0, self.owner)[..., None]).exp_()
        total = self._by_pair(weights.sum(dim=-1, dtype=torch.float32)).sum(dim=1)  # [pairs, group]
        mixed = self._by_pair(torch.bmm(weights, values)).sum(dim=1, dtype=torch.float32)  # [pairs, group, head_dim]
        return mixed.div_(total[..., None]).to(query.dtype)

    def _by_pair(self, tensor: Tensor) -> Tensor:
        """`[blocks, …]` -> `[pairs, most blocks of a pair, …]`."""
        if self.uneven:
            tensor = tensor.index_select(0, self.table.view(-1))
        return tensor.view(*self.table.shape, *tensor.shape[1:])

    def judge(self, expiry: Tensor, score: Tensor | None) -> None:
        """What is known by now of the tokens that came first, both `[pairs, tokens]`."""
        slots = self.coming[: expiry.shape[1]].T
        self.fields.expiry[slots] = expiry.int()
        if self.fields.score is not None and score is not None:
            self.fields.score[slots] = score

    def pair(self) -> Tensor:
        """The pair of each slot, int64 `[blocks · size]`."""
        return self.owner.repeat_interleave(self.size)

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Where the slots of the pairs lie, one pair a line: int64 `[pairs, most]`, and bool of what is one there."""
        index = (self.table[..., None] * self.size + torch.arange(self.size, device=self.table.device)).flatten(1)
        return index, self.owner[index // self.size] == torch.arange(len(self.counts), device=index.device)[:, None]


def page_size(keys: float) -> int:
    """Slots of a block for pairs of `keys` keys: half a block a pair is lost, and small blocks are slow."""
    return next((size for size in (16, 32, 64) if keys < 48 * size), 128)


def spare_tokens(keys: float, shortest_life: int) -> int:
    """Tokens to take in before keys are packed anew: packing copies them all, and waiting keeps dead ones.

    Args:
        keys: of a pair, on average.
        shortest_life: tokens that every new key is seen for at least; before that nothing new can die.
    """
    return max(1, min(max(16, int(keys) // 16), MAX_SPARE, shortest_life))
