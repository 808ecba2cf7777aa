"""The step from products of queries and keys to attention probabilities, which differs between model families.

Most families scale the products and take their softmax. Gemma 2 also caps the scores. GPT-OSS has *learned sinks*: a
logit of each query head that takes part in the softmax and has no key and no value. (The sinks of the rest of SmartKV
are the first keys of a text.)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Softmax(NamedTuple):
    """How one layer turns products of queries and keys into probabilities.

    Attributes:
        scaling: Factor on the products.
        cap: Largest size of a score: `cap · tanh(score / cap)` takes its place. None: scores are not capped.
        learned_sinks: A logit of each query head that has no key, `[query_heads]`. None: there are none.
    """

    scaling: float
    cap: float | None = None
    learned_sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scaling is all: then a number added to all scores of a query changes nothing."""
        return self.cap is None and self.learned_sinks is None

    def of_pairs(self, pairs: Tensor, kv_heads: int) -> "Softmax":
        """Return the same for some pairs in place of KV heads; a pair is a row of the batch and a KV head.

        Args:
            pairs: int64 `[pairs]`, each `row · kv_heads + head`.
            kv_heads: Number of KV heads.
        """
        if self.learned_sinks is None:
            return self
        return self._replace(learned_sinks=self.learned_sinks.view(kv_heads, -1)[pairs % kv_heads].flatten())

    def scores(self, products: Tensor) -> Tensor:
        """Return the scores of products of queries and keys, float32."""
        scores = products.float() * self.scaling
        return scores if self.cap is None else self.capped(scores)

    def capped(self, scores: Tensor) -> Tensor:
        """Return scores, scaled already, with the cap."""
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap

    def log_total(self, scores: Tensor) -> Tensor:
        """Return the logarithm of the sum by which the softmax divides.

        Args:
            scores: float32 `[…, kv_heads, group, queries, keys]`, −inf where a query does not see a key.

        Returns:
            float32 `[…, kv_heads, group, queries]`.
        """
        total = scores.logsumexp(dim=-1)
        if self.learned_sinks is None:
            return total
        return torch.logaddexp(total, self.learned_sinks.float().view(*scores.shape[-4:-2], 1))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities of keys; with learned sinks they sum to less than 1. Arguments as in `log_total`."""
        if self.learned_sinks is None:
            return scores.softmax(dim=-1)
        return (scores - self.log_total(scores)[..., None]).exp()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
        """Compute attention step by step, for a softmax that no kernel of torch computes.

        Args:
            query: `[batch, kv_heads, group, queries, head_dim]`; `batch` may be missing, here and below.
            key, value: `[batch, kv_heads, keys, head_dim]`.
            mask: bool `[batch, kv_heads, queries, keys]`, or of a shape that broadcasts to it.
            dropout: Share of the probabilities that are dropped.

        Returns:
            A tensor like `query`.
        """
        shape = query.shape[-3:-1]
        scores = self.scores((query.flatten(-3, -2) @ key.mT).unflatten(-2, shape))
        weights = self.probabilities(scores.masked_fill(~mask.unsqueeze(-3), float("-inf")))
        mixed = F.dropout(weights, dropout).to(value.dtype).flatten(-3, -2) @ value
        return mixed.unflatten(-2, shape)
