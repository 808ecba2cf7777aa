"""Who decides which keys are gone while a model is trained: chance, a sliding window, or gates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from smartkv.distillation.soft_attention import HIDDEN, soft_eviction
from smartkv.distillation.soft_keep import footprint, hard_keep, keep_share
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.policies.budgets import policy_of
from smartkv.sparsity.masked_attention import sparse_attention

Share = Literal["head", "layer", "model"]
Seen = Callable[[int], Tensor]
"""(first) -> footprint: share of a full cache's keys that the queries from `first` on saw in the last forward pass."""


def share_seen(stays: Tensor, recent: int, first_query: int) -> Tensor:
    """The same, where keys stay for good or go after a window.

    Args:
        stays: bool `[…, tokens]`, keys that stay for good; the figure is the mean over all else.
        recent: latest tokens that every query sees.
    """
    query = torch.arange(first_query, stays.shape[-1], device=stays.device)
    before = F.pad(stays.cumsum(dim=-1), (1, 0))  # keys that stay among the first so many
    seen = before[..., (query + 1 - recent).clamp(min=0)] + (query + 1).clamp(max=recent)
    return seen.sum(dim=-1).double().mean() / (query + 1).sum()


@dataclass(frozen=True)
class KeyDropout:
    """Chance: each key that is no anchor stays with probability `keep_ratio`.

    Args:
        layers, kv_heads: of the model.
        recent: latest tokens that every query sees.
        share: who draws alike: `head`: nobody; `layer`: the heads of a layer; `model`: all.
    """

    layers: int
    kv_heads: int
    recent: int
    share: Share = "head"

    def draw(self, always: Tensor, keep_ratio: float, seeds: Sequence[int]) -> Tensor:
        """Which keys stay, bool `[layers, batch, kv_heads, tokens]`.

        Args:
            always: bool `[batch, tokens]`, anchors.
            seeds: one a row: what is drawn does not depend on the rows beside it.
        """
        batch, tokens = always.shape
        layers = 1 if self.share == "model" else self.layers
        heads = self.kv_heads if self.share == "head" else 1
        rows = [torch.rand(layers, heads, tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        drawn = torch.stack(rows, dim=1).to(always.device) < keep_ratio
        found = drawn | always[None, :, None]
        return found.expand(self.layers, batch, self.kv_heads, tokens)

    @contextmanager
    def dropped(
        self,
        model: PreTrainedModel,
        always: Tensor,
        keep_ratio: float,
        seeds: Sequence[int],
        real: Tensor | None = None,
    ) -> Iterator[Seen]:
        """Inside, `model` attends without the keys that a draw takes away; arguments as `draw` and `sparse_mask`."""
        drawn = self.draw(always, keep_ratio, seeds)
        with sparse_attention(model, lambda layer: drawn[layer], self.recent, real):
            yield partial(share_seen, drawn, self.recent)


@contextmanager
def window_attention(model: PreTrainedModel, window: int, sinks: int, batch: int, tokens: int) -> Iterator[Seen]:
    """Inside, `model` sees sinks and the latest `window` tokens, as under the policy `window`."""
    always = torch.zeros(batch, 1, tokens, dtype=torch.bool, device=model.device)
    always[..., :sinks] = True
    with sparse_attention(model, lambda _: always, window):
        yield partial(share_seen, always, window)


class GatedDropping:
    """Gates decide, as they are deployed: each key by itself, for several ages, above one price.

    Args:
        gates: that judge for ages, and remember prices for a policy in which they judge in all layers, from their first
            age on.
        footprint: share of the full cache for which their price is taken.
        temperature: of a soft decision, through which gates learn too; None: keys stay or go.

    Raises:
        SmartKVError: gates that do not judge for ages, go with another policy, or have no price for that footprint.
    """

    def __init__(self, gates: GateBank, footprint: float, temperature: float | None = None) -> None:
        if not gates.ages:
            raise SmartKVError("gates that drop keys in training judge for ages: distil them first (DistilledGates)")
        if temperature is not None and temperature <= 0:
            raise SmartKVError(f"temperature must be above 0, got {temperature}")
        policy = policy_of(gates, footprint)
        layers = gates.fingerprint.layers
        alike = ("gated", gates.ages[0], None)
        if policy.price is None or any(
            (rule.rule, rule.window, rule.price) != alike for rule in policy.by_layer(layers)
        ):
            raise SmartKVError(
                "training drops keys as gates of all layers have it, from their first age on "
                f"({gates.ages[0]} tokens): these gates go with a policy of other rules, windows or prices"
            )
        self.gates, self.price, self.temperature = gates, policy.price, temperature
        self.sinks = policy.sinks

    def log_keep(self, layer: int, keys: Tensor) -> Tensor:
        """Log of the share of each key that is kept from each age on, float32 `[ages, batch, kv_heads, tokens]`, from
        keys before the rotary embedding."""
        if not self.gates.weight2.requires_grad:
            keys = keys.detach()  # or the model would learn to make its keys look worth keeping, which costs it nothing
        worth = self.gates.predict(layer, keys)
        if self.temperature is None:
            return (~hard_keep(worth, self.price)).float().mul(HIDDEN).movedim(-1, 0)
        return keep_share(worth, self.price, self.temperature)[1].movedim(-1, 0)

    @contextmanager
    def dropped(self, model: PreTrainedModel) -> Iterator[Seen]:
        """Inside, `model` attends as the gates have it (no padding). Through the footprint, too, gates learn."""
        kept: dict[int, Tensor] = {}

        def log_keep(layer: int, keys: Tensor) -> Tensor:
            kept[layer] = self.log_keep(layer, keys)
            return kept[layer]

        def seen(first_query: int) -> Tensor:
            keep = torch.cat([log.exp().movedim(0, -1).flatten(0, 1) for log in kept.values()])
            return footprint(keep, self.gates.ages, self.sinks, first_query)

        with soft_eviction(model, log_keep, self.gates.ages, self.sinks):
            yield seen
