"""Methods and their simulation in plain loops, one head, one query and one key at a time."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Scores = list[float]


class Head:
    """One KV head: the position, key and value of each key that is left, and all queries so far."""

    def __init__(self, scaling: float) -> None:
        self.left: list[tuple[int, Tensor, Tensor]] = []
        self.queries: list[list[Tensor]] = []  # of each token, of each query head
        self.got: dict[int, float] = {}  # attention so far, by position
        self.scaling = scaling

    def weights(self, query: Tensor, place: int, own: int | None = None) -> list[float]:
        """Attention of one query over the keys that are left."""
        raw = []
        for position, key, _ in self.left:
            visible = position <= place and (own is None or position > place - own)
            raw.append(math.exp(float(query @ key) * self.scaling) if visible else 0.0)
        return [weight / sum(raw) for weight in raw]


def norm(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def key_norm(heads: list[Head]) -> list[Scores]:
    return [[-norm(key) for _, key, _ in head.left] for head in heads]


def recency(heads: list[Head]) -> list[Scores]:
    return [[float(position) for position, *_ in head.left] for head in heads]


def keydiff(heads: list[Head]) -> list[Scores]:
    scores = []
    for head in heads:
        anchor = sum(key / norm(key) for _, key, _ in head.left) / len(head.left)
        scores.append([-float(key @ anchor) / (norm(key) * norm(anchor)) for _, key, _ in head.left])
    return scores


def snapkv(heads: list[Head], queries: int = 4, kernel: int = 5) -> list[Scores]:
    scores = []
    for head in heads:
        read, group = len(head.queries), len(head.queries[0])
        looking = range(max(0, read - queries), read)
        seen = [head.weights(head.queries[i][g], i) for i in looking for g in range(group)]
        mean = [sum(weights[n] for weights in seen) / len(seen) for n in range(len(head.left))]
        reach = kernel // 2
        scores.append([sum(mean[max(0, n - reach) : n + reach + 1]) / kernel for n in range(len(mean))])
    return scores


def tova(heads: list[Head]) -> list[Scores]:
    last = len(heads[0].queries) - 1
    seen = [head.weights(query, last) for head in heads for query in head.queries[last]]
    mean = [sum(weights[n] for weights in seen) / len(seen) for n in range(len(heads[0].left))]
    return [mean for _ in heads]


def h2o(heads: list[Head]) -> list[Scores]:
    return [[head.got[position] for position, *_ in head.left] for head in heads]


def expected_attention(heads: list[Head]) -> list[Scores]:
    """Expected attention in a model without a rotary embedding."""
    scores = []
    for head in heads:
        group, read, expected = len(head.queries[0]), len(head.queries), [0.0] * len(head.left)
        for g in range(group):
            mean = sum(queries[g] for queries in head.queries) / read
            apart = [queries[g] - mean for queries in head.queries]
            covariance = sum(torch.outer(a, a) for a in apart) / read
            raw = []
            for _, key, _ in head.left:
                spread = float(key @ covariance @ key) * head.scaling**2 / 2
                raw.append(math.exp(float(key @ mean) * head.scaling + spread))
            expected = [sum_ + weight / sum(raw) / group for sum_, weight in zip(expected, raw, strict=True)]
        scores.append([weight * norm(value) for weight, (*_, value) in zip(expected, head.left, strict=True)])
    return scores


def simulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    own: int | None,
    tiles: Iterable[tuple[int, int, int | None]],
    window: int,
    sinks: int,
    score: Callable[[list[Head]], list[Scores]],
) -> tuple[Tensor, Tensor]:
    """Attend with `q` `[query_heads, tokens, head_dim]` and `k`, `v` `[kv_heads, tokens, head_dim]` under eviction.

    Returns an output like `q`, and the number of keys that each query saw, `[kv_heads, tokens]`.
    """
    group, heads = len(q) // len(k), [Head(scaling) for _ in k]
    output, seen = torch.zeros_like(q), torch.zeros(k.shape[:2], dtype=torch.int64)
    for start, stop, budget in tiles:
        for number, head in enumerate(heads):
            for i in range(start, stop):
                head.left.append((i, k[number, i], v[number, i]))
                head.got[i] = 0.0
            for i in range(start, stop):
                head.queries.append([q[number * group + g, i] for g in range(group)])
                for g in range(group):
                    weights = head.weights(q[number * group + g, i], i, own)
                    output[number * group + g, i] = sum(
                        w * each for w, (*_, each) in zip(weights, head.left, strict=True)
                    )
                    for weight, (position, *_) in zip(weights, head.left, strict=True):
                        head.got[position] += weight / group
                seen[number, i] = sum(weight > 0 for weight in weights)
        if budget is not None and budget < len(heads[0].left):
            for head, scores in zip(heads, score(heads), strict=True):
                pinned = [p < sinks or p >= stop - window for p, *_ in head.left]
                order = sorted(range(len(scores)), key=lambda n: (not pinned[n], -scores[n]))
                head.left = [head.left[n] for n in sorted(order[:budget])]
    return output, seen
