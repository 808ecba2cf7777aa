"""Contenders that give each key a score: nulls, oracles, and gates in protocol `once`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.contenders.base import EvictionProtocol, Reading
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import FootprintOutOfReach
from smartkv.gates.bank import GateBank
from smartkv.metrics.perplexity import token_losses
from smartkv.models.backbone import Backbone
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER


class Scores(Protocol):
    """A function that scores each key of a text; keys with a larger score stay longer."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Score the keys of `tokens` (ids `[tokens]`); float32 `[layers, kv_heads, tokens]`."""


class _TableCache(LifespanCache):
    """A cache whose keys live as long as a table says.

    Attributes:
        table: TTLs, int64 `[layers, kv_heads, tokens]`.
    """

    table: Tensor

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        """Look the TTLs of new keys up; see `LifespanCache`."""
        return self.table[layer][None].to(keys.device).gather(2, position[:, None].expand(keys.shape[:3]))


class ScoredContender:
    """A contender whose keys each have a score that is known at once, and stay above one price for all heads.

    Args:
        lm: the model.
        name: see `Contender`.
        kind: see `Contender`.
        needs: see `Contender`.
        scores: scores the keys of a text.
        windows: calibration texts, ids `[tokens]` each.
        first_query: queries of the calibration texts from this one on count.
        window: number of latest tokens that always stay.
        sinks: number of first tokens that always stay.
        lifespans: scores are log4 of lifespans, and each key stays for a multiple of its own.
        protocol: stream or once.
    """

    def __init__(
        self,
        lm: Backbone,
        name: str,
        kind: str,
        needs: str,
        scores: Scores,
        windows: Sequence[Tensor],
        first_query: int,
        window: int = 32,
        sinks: int = 4,
        lifespans: bool = False,
        protocol: EvictionProtocol = "stream",
    ) -> None:
        self.lm, self.name, self.kind, self.needs, self.scores = lm, name, kind, needs, scores
        self.lifespans, self.protocol, self.first_query = lifespans, protocol, first_query
        open_figures: dict[str, Any] = {"price": -math.inf, "multiple": None} if lifespans else {}
        self.policy = HybridPolicy((LayerRule("all", "gated", window),), sinks=sinks, name=name, **open_figures)
        with torch.inference_mode():
            self.tables = [scores(tokens) for tokens in windows]

    def solved(self, footprint: float) -> Any:
        """Find the price, or the multiple of lifespans; see `Contender.solved`."""
        if self.protocol == "once":
            return price_for_share(self.tables, footprint, self.first_query, self.policy)
        tables = torch.stack(self.tables, dim=1)  # [layers, windows, kv_heads, tokens]
        calibration = Calibration(
            dict(enumerate(tables)), len(tables), tables.shape[-1], self.first_query, tables.shape[-1]
        )
        policy = solve(self.policy, footprint, calibration)
        return policy.multiple if self.lifespans else policy.price

    @torch.inference_mode()
    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text whose keys live as their scores say; see `Contender.read`."""
        table = self.scores(tokens)
        if prefill is not None:
            ttl = lifetimes_once(table, setting, prefill, self.policy)
        else:
            open_figure = {"multiple": setting} if self.lifespans else {"price": setting}
            policy = replace(self.policy, **open_figure)
            ttl = torch.as_tensor(policy.times_to_live(policy.rules[0], table))
        return read_with_lifetimes(
            self.lm, ttl, tokens, first_token, first_query, self.policy.rules[0].window or 1, self.policy.sinks
        )


def read_with_lifetimes(
    lm: Backbone, ttl: Tensor, tokens: Tensor, first_token: int, first_query: int, window: int = 1, sinks: int = 0
) -> Reading:
    """Read a text whose keys live as long as a table says.

    Args:
        lm: the model.
        ttl: times to live in tokens, int64 `[layers, kv_heads, tokens]`.
        tokens: ids `[tokens]`.
        first_token: tokens from this one on are scored.
        first_query: queries from this one on count for the footprint.
        window: number of latest tokens that always stay.
        sinks: number of first tokens that always stay.
    """
    plain = HybridPolicy((LayerRule("all", "window", window),), sinks=sinks)
    with _TableCache(lm.model, None, plain, first_query=first_query) as cache:
        cache.table = ttl
        losses = token_losses(lm.model, tokens, first_token, cache)
        return Reading(*losses, cache.footprint, cache.peak_bytes)


def price_for_share(tables: Sequence[Tensor], share: float, prefill: int, policy: HybridPolicy) -> float:
    """Find the price above which a share of a prefill's keys stays, sinks and window included.

    Args:
        tables: scores of the calibration texts, `[layers, kv_heads, tokens]` each.
        share: of the prefill's keys.
        prefill: tokens.
        policy: gives the number of sinks and the window, which always stay.

    Raises:
        FootprintOutOfReach: sinks and window alone are more than the share.
    """
    window, sinks = policy.rules[0].window or 0, policy.sinks
    room = share * prefill - window - sinks
    if room < 0:
        raise FootprintOutOfReach(
            f"{share:.3g} of {prefill} tokens is less than {sinks} sinks and a window of {window}"
        )
    open_keys = torch.cat([table[..., sinks : prefill - window].flatten() for table in tables])
    quantile = 1 - min(1.0, room / (prefill - window - sinks))
    ordered = open_keys.sort().values
    return float(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))])


def lifetimes_once(table: Tensor, price: float, prefill: int, policy: HybridPolicy) -> Tensor:
    """Return TTLs by which the keys of a prefill are evicted at its end, unless their score reaches the price.

    Args:
        table: scores, `[layers, kv_heads, tokens]`.
        price: least score of a key that stays.
        prefill: tokens.
        policy: gives the window, which always stays.

    Returns:
        int64, shaped like `table`.
    """
    position = torch.arange(table.shape[-1])
    stays = (table >= price) | (position >= prefill - (policy.rules[0].window or 0))
    return torch.where(stays, FOREVER, prefill - position)


class GateScores:
    """Scores that gates give to the keys of a text that is read with a full cache.

    Gates with outputs for several ages give that of the last age.
    """

    def __init__(self, lm: Backbone, gates: GateBank) -> None:
        self.lm, self.gates = lm, gates

    def __call__(self, tokens: Tensor) -> Tensor:
        """Score the keys; see `Scores`."""
        keys = read_keys(self.lm.model, tokens)
        scores = [self.gates.score(layer, layer_keys)[0].cpu() for layer, layer_keys in enumerate(keys)]
        return torch.stack([self.gates.single_score(score) for score in scores])
