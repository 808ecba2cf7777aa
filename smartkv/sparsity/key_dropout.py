"""Rules by which keys are dropped while a model is trained: at random, by a sliding window, or by gates."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from smartkv.gates.standardization import StandardizedGates
from smartkv.models.architecture import Architecture
from smartkv.models.wrappers import language_model
from smartkv.policies.budgets import policy_of
from smartkv.sparsity.masked_attention import sparse_attention

Share = Literal["head", "layer", "model"]
Seen = Callable[[int], Tensor]
"""Function of the first counted query: share of a full cache's keys that it and later queries saw in the last pass."""


def share_seen(stays: Tensor, recent: int, first_query: int) -> Tensor:
    """Compute the footprint where a key either stays for good or goes after a window.

    Args:
        stays: Keys that stay for good, bool `[…, tokens]`.
        recent: Number of latest tokens that every query sees.
        first_query: Index of the first query that counts.

    Returns:
        float64 scalar: the share of a full cache's keys that is seen, mean over all leading dimensions.
    """
    query = torch.arange(first_query, stays.shape[-1], device=stays.device)
    before = F.pad(stays.cumsum(dim=-1), (1, 0))  # entry n: keys that stay among the first n
    seen = before[..., (query + 1 - recent).clamp(min=0)] + (query + 1).clamp(max=recent)
    return seen.sum(dim=-1).double().mean() / (query + 1).sum()


@dataclass(frozen=True)
class KeyDropout:
    """Random dropping, by which each key that is no anchor stays with probability `keep_ratio`.

    Attributes:
        layers: Number of layers of the model.
        kv_heads: Number of KV heads per layer.
        recent: Number of latest tokens that every query sees.
        share: Which heads share a draw: "head" (none), "layer" (the heads of a layer) or "model" (all).
    """

    layers: int
    kv_heads: int
    recent: int
    share: Share = "head"

    def draw(self, always: Tensor, keep_ratio: float, seeds: Sequence[int]) -> Tensor:
        """Draw which keys stay.

        Args:
            always: Anchors, bool `[batch, tokens]`.
            keep_ratio: Probability with which any other key stays.
            seeds: One seed per row, so that a draw does not depend on the other rows of the batch.

        Returns:
            bool `[layers, batch, kv_heads, tokens]`.
        """
        batch, tokens = always.shape
        layers = 1 if self.share == "model" else self.layers
        heads = self.kv_heads if self.share == "head" else 1
        rows = [torch.rand(layers, heads, tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        drawn = torch.stack(rows, dim=1).to(always.device) < keep_ratio
        stays = drawn | always[None, :, None]
        return stays.expand(self.layers, batch, self.kv_heads, tokens)

    @contextmanager
    def dropped(
        self,
        model: PreTrainedModel,
        always: Tensor,
        keep_ratio: float,
        seeds: Sequence[int],
        real: Tensor | None = None,
    ) -> Iterator[Seen]:
        """Run forward passes of `model` without randomly dropped keys inside this context.

        Args:
            model: The model.
            always: Anchors, bool `[batch, tokens]`.
            keep_ratio: Probability with which any other key stays.
            seeds: One seed per row.
            real: bool `[batch, tokens]`, False for padding. None means that there is no padding.

        Yields:
            The footprint (see `Seen`).
        """
        stays = self.draw(always, keep_ratio, seeds)
        with sparse_attention(model, lambda layer: stays[layer], self.recent, real):
            yield partial(share_seen, stays, self.recent)


@contextmanager
def window_attention(model: PreTrainedModel, window: int, sinks: int, batch: int, tokens: int) -> Iterator[Seen]:
    """Run forward passes of `model` with sinks and a sliding window, as under the policy `window`.

    Args:
        model: The model.
        window: Number of latest tokens that a query sees, its own included.
        sinks: Number of tokens at the start that every query sees.
        batch: Rows of the forward passes.
        tokens: Tokens of the forward passes.

    Yields:
        The footprint (see `Seen`).
    """
    always = torch.zeros(batch, 1, tokens, dtype=torch.bool, device=model.device)
    always[..., :sinks] = True
    with sparse_attention(model, lambda _: always, window):
        yield partial(share_seen, always, window)


class GatedDropping:
    """Dropping by gates, as in the cache: each key is judged by itself, at several ages, against one price.

    Args:
        gates: Gates that judge by age. Their policy must ask the gates in all layers from the first age on, and their
            prices must reach the footprint.
        footprint: Share of the full cache for which the price is taken.
        temperature: Temperature of soft decisions, through which the gates can learn. None means hard decisions.

    Raises:
        SmartKVError: The gates do not judge by age, have another policy, or have no price for the footprint.
    """

    def __init__(self, gates: GateBank, footprint: float, temperature: float | None = None) -> None:
        if not gates.ages:
            raise SmartKVError(
                "dropping keys in training needs gates that judge by age, these judge a key once: "
                "distil them first (DistilledGates)"
            )
        if temperature is not None and temperature <= 0:
            raise SmartKVError(f"temperature must be above 0, got {temperature}")
        policy = policy_of(gates, footprint)
        layers = gates.fingerprint.layers
        expected = ("gated", gates.ages[0], None)
        if policy.price is None or any(
            (rule.rule, rule.window, rule.price) != expected for rule in policy.by_layer(layers)
        ):
            raise SmartKVError(
                f"dropping keys in training needs a policy that asks the gates in all layers from {gates.ages[0]} "
                "tokens on, at one price: these gates go with a policy of other rules, windows or prices"
            )
        self.bank = gates
        self.gates: GateBank | StandardizedGates = gates
        self.ages, self.price, self.temperature = gates.ages, policy.price, temperature
        self.sinks = policy.sinks

    def standardize(self, keys: Iterable[list[Tensor]]) -> StandardizedGates:
        """Let the gates read standardised keys from now on, as they must where they learn.

        Args:
            keys: Keys of some windows, as for `key_moments`.

        Returns:
            The gates, to be trained.
        """
        standardized = StandardizedGates(self.bank, keys)
        self.gates = standardized
        return standardized

    def log_keep(self, layer: int, keys: Tensor) -> Tensor | None:
        """Compute the log of the share of each key that is kept from each age on.

        Args:
            layer: Index of the layer.
            keys: `[batch, kv_heads, tokens, head_dim]`, before the rotary embedding.

        Returns:
            float32 `[ages, batch, kv_heads, tokens]`. None for a layer without gates.
        """
        if layer not in self.gates.layers:
            return None
        if not any(weight.requires_grad for weight in self.gates.parameters()):
            # Otherwise the model would learn to make its keys look worth keeping, at no cost to itself.
            keys = keys.detach()
        worth = self.gates.predict(layer, keys)
        if self.temperature is None:
            return (~hard_keep(worth, self.price)).float().mul(HIDDEN).movedim(-1, 0)
        return keep_share(worth, self.price, self.temperature)[1].movedim(-1, 0)

    @contextmanager
    def dropped(self, model: PreTrainedModel) -> Iterator[Seen]:
        """Run forward passes of `model`, without padding, under the decisions of the gates inside this context.

        Args:
            model: The model.

        Yields:
            The footprint (see `Seen`). It has a gradient to gates that are trained.
        """
        kept: dict[int, Tensor] = {}

        own = Architecture.of(language_model(model).config).sliding_windows

        def log_keep(layer: int, keys: Tensor) -> Tensor | None:
            if (log := self.log_keep(layer, keys)) is not None:
                kept[layer] = log
            return log

        def seen(first_query: int) -> Tensor:
            keep = torch.cat([log.exp().movedim(0, -1).flatten(0, 1) for log in kept.values()])
            return footprint(keep, self.ages, self.sinks, first_query, own)

        with soft_eviction(model, log_keep, self.ages, self.sinks):
            yield seen
