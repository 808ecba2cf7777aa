"""Random stored keys for the tests of a layer's storage, and attention over them in plain loops."""

import math

import torch
from torch import Tensor

from smartkv.cache.ragged import Fields, Ragged
from smartkv.policies.lifetimes import HOLE

HEAD_DIM = 8


def random_store(counts: list[int], seed: int = 0, scored: bool = False) -> Ragged:
    """So many keys a pair, at rising positions from 0, with expiries from 20 to 39."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    key, value = (torch.randn(total, HEAD_DIM, generator=generator) for _ in range(2))
    position = torch.cat([torch.arange(count) for count in counts]).int()
    expiry = torch.randint(20, 40, (total,), generator=generator).int()
    score = torch.rand(total, generator=generator) if scored else None
    return Ragged(Fields(key, value, position, expiry, score), torch.tensor(counts))


def keys_of(store: Ragged, pair: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """Key, value, position and expiry of each key of a pair, by counting."""
    start = sum(store.counts.tolist()[:pair])
    fields = store.fields
    return [
        (fields.key[i], fields.value[i], int(fields.position[i]), int(fields.expiry[i]))
        for i in range(start, start + int(store.counts[pair]))
        if int(fields.position[i]) != HOLE
    ]


def plain_attention(query: Tensor, keys: list[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """Softmax attention of one query `[head_dim]` over (key, value) pairs, key by key."""
    scores = [float(query @ key) * scaling for key, _ in keys]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    output = torch.zeros_like(query)
    for weight, (_, value) in zip(weights, keys, strict=True):
        output = output + weight / sum(weights) * value
    return output
