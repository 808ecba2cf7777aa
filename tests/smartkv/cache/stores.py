"""Random stored keys for the tests of a layer's storage, and attention over them in plain loops."""

import math

import torch
from torch import Tensor

from smartkv.cache.ragged import Fields, Ragged
from smartkv.models.softmax import Softmax
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


def softmaxes(query_heads: int) -> list[Softmax]:
    """Each kind of softmax: plain, with a cap, with learned sinks, with both."""
    learned = torch.randn(query_heads, generator=torch.Generator().manual_seed(3))
    return [Softmax(0.3), Softmax(0.3, 0.5), Softmax(0.3, None, learned), Softmax(0.3, 0.5, learned)]


def plain_attention(query: Tensor, keys: list[tuple[Tensor, Tensor]], softmax: Softmax, head: int = 0) -> Tensor:
    """Softmax attention of one query `[head_dim]` of a query head over (key, value) pairs, key by key."""
    scores = [float(query @ key) * softmax.scaling for key, _ in keys]
    if softmax.cap is not None:
        scores = [softmax.cap * math.tanh(score / softmax.cap) for score in scores]
    weights = [math.exp(score) for score in scores]
    total = sum(weights)
    if softmax.learned_sinks is not None:
        total += math.exp(float(softmax.learned_sinks[head]))
    output = torch.zeros_like(query)
    for weight, (_, value) in zip(weights, keys, strict=True):
        output = output + weight / total * value
    return output
