"""Who is compared: gates by their policies, plain rules, nulls, and oracles, each read in one forward pass.

Two protocols. `stream`: keys go while the text is read. `once`: the first `prefill` tokens are read with a full cache,
then each of their keys stays for good or goes, and all later ones stay.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from smartkv.attached import AttachedCache
from smartkv.attention import read_keys
from smartkv.backbones import Backbone
from smartkv.blocks import FOREVER
from smartkv.budgets import Calibration, solve
from smartkv.cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates import GateBank
from smartkv.perplexity import losses_after, token_losses
from smartkv.policies import HybridPolicy, LayerRule
from smartkv.quantized_cache import QuantizedCache

Protocol_ = Literal["stream", "once"]


class Reading(NamedTuple):
    """One text under a contender.

    Attributes:
        nll: float32 `[scored tokens]`, nats.
        rank: int64 `[scored tokens]`, how many tokens are likelier; 0: greedy decoding would have said it.
        footprint: share of a full cache's keys that the counted queries see, mean over KV heads.
        peak_bytes: largest storage; None: simulated by a mask, nothing is freed.
        stored: bytes held when the text was read, over those of its keys and values in float16, see `stored_share`;
            None: a mask.
    """

    nll: Tensor
    rank: Tensor
    footprint: float
    peak_bytes: int | None
    stored: float | None = None


class Contender(Protocol):
    """Decides which keys stay.

    Attributes:
        name: what results call it.
        kind: ours, rule, null, oracle, quantised (every key stays, in few bits), or full.
        needs: what it takes at inference: nothing, keys, queries, attention weights, or the text to come.
    """

    name: str
    kind: str
    needs: str

    def solved(self, footprint: float) -> Any:
        """What it is to be set to, for JSON, to keep that share: of the cache (`stream`) or of the prefill (`once`).

        Raises:
            SmartKVError: out of its reach.
        """

    def read(self, setting: Any, tokens: Tensor, first: int, count_from: int, prefill: int | None) -> Reading:
        """Read `tokens` (ids `[tokens]`) and score those from `first` on.

        Args:
            setting: what `solved` found.
            count_from: queries from this one on count for the footprint.
            prefill: tokens after which keys go, for `once`; None: `stream`.
        """


class Decoding(Protocol):
    """A contender that decodes too, by a real cache.

    Attributes:
        at_once: tokens of a prompt that are fed together; None: all.
    """

    at_once: int | None

    def open(self, setting: Any, count_from: int) -> AbstractContextManager[Cache]:
        """A new cache for the model, for the time inside."""


class Full:
    """A full cache."""

    at_once: int | None = None

    name, kind, needs = "full", "full", "nothing"

    def __init__(self, lm: Backbone) -> None:
        self.lm = lm

    def solved(self, footprint: float) -> Any:
        return 1.0

    def read(self, setting: Any, tokens: Tensor, first: int, count_from: int, prefill: int | None) -> Reading:
        return Reading(*token_losses(self.lm.model, tokens, first), 1.0, None)

    def open(self, setting: Any, count_from: int) -> AbstractContextManager[Cache]:
        return nullcontext(DynamicCache())


@dataclass
class Ruled:
    """A policy, with gates or without, that frees what it lets go, and packs what stays if `bits` says so."""

    lm: Backbone
    gates: GateBank | None
    policy: HybridPolicy
    calibrate: Callable[[], Calibration]  # called when a price is to be solved
    kind: str = "ours"
    bits: tuple[int, int] | None = None  # of keys and of values
    at_once: int | None = None

    @property
    def name(self) -> str:
        if self.bits is None:
            return self.policy.name
        key, value = self.bits
        return f"{self.policy.name}+{f'{key}bit' if key == value else f'k{key}v{value}'}"

    @property
    def needs(self) -> str:
        return "keys" if self.policy.gated else "nothing"

    def solved(self, footprint: float) -> Any:
        found = solve(self.policy, footprint, self.calibrate()) if self.policy.open else self.policy
        return found.to_dict()

    def read(self, setting: Any, tokens: Tensor, first: int, count_from: int, prefill: int | None) -> Reading:
        with self.open(setting, count_from) as cache:
            found = token_losses(self.lm.model, tokens, first, cache)
            cache.settle()
            return Reading(*found, cache.footprint, cache.peak_bytes, stored_share(self.lm, cache, len(tokens) - 1))

    def open(self, setting: Any, count_from: int) -> LifespanCache:
        policy = HybridPolicy.from_dict(setting)
        gates = self.gates if policy.gated else None
        return LifespanCache(self.lm.model, gates, policy, count_from=count_from, bits=self.bits)


def stored_share(lm: Backbone, cache: LifespanCache | QuantizedCache, tokens: int) -> float:
    """Bytes of a cache over those of one sequence of so many tokens in float16; what is not packed counts as two bytes
    an element, whatever the model computes in here."""
    wider = cache.exact_bytes * (1 - 2 / lm.model.dtype.itemsize)
    return (cache.storage_bytes - wider) / (2 * lm.architecture.gates * lm.architecture.head_dim * 2 * tokens)


@dataclass
class Quantised:
    """Every key stays, in few bits. The text is read in pieces, as decoding would: a query sees quantised keys."""

    lm: Backbone
    name: str
    make: Callable[[], QuantizedCache]
    needs: str = "nothing"
    kind: str = "quantised"
    at_once: int | None = 32  # tokens; no more than a block, so that the same keys are exact as in decoding

    def solved(self, footprint: float) -> Any:
        return 1.0

    @torch.inference_mode()
    def read(self, setting: Any, tokens: Tensor, first: int, count_from: int, prefill: int | None) -> Reading:
        ids, peak, hidden = tokens.long().to(self.lm.model.device), 0, []
        with self.open(setting, count_from) as cache:
            for part in ids[None, :-1].split(self.at_once or len(ids), dim=1):
                hidden.append(self.lm.model.base_model(input_ids=part, past_key_values=cache).last_hidden_state[0])
                peak = max(peak, cache.storage_bytes + cache.read_bytes)
            found = losses_after(self.lm.model, torch.cat(hidden)[first - 1 :], ids[first:])
            return Reading(*found, 1.0, peak, stored_share(self.lm, cache, len(tokens) - 1))

    def open(self, setting: Any, count_from: int) -> AbstractContextManager[QuantizedCache]:
        cache = self.make()
        return cache if isinstance(cache, AttachedCache) else nullcontext(cache)


class Scores(Protocol):
    """A figure for each key of a text: larger stays longer."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """ids `[tokens]` -> float32 `[layers, kv_heads, tokens]`."""


class _Tabled(LifespanCache):
    """TTLs from a table `[layers, kv_heads, tokens]`."""

    table: Tensor

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        return self.table[layer][None].to(keys.device).gather(2, position[:, None].expand(keys.shape[:3]))


class Scored:
    """Keys stay by a figure each, known when they are born, above one price for all heads.

    Args:
        name, kind, needs: as `Contender`.
        scores: of a text's keys.
        window, sinks: tokens that always stay.
        windows: calibration texts, ids `[tokens]` each.
        first: queries of them that count.
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
        first: int,
        window: int = 32,
        sinks: int = 4,
        lifespans: bool = False,
        protocol: Protocol_ = "stream",
    ) -> None:
        self.lm, self.name, self.kind, self.needs, self.scores = lm, name, kind, needs, scores
        self.lifespans, self.protocol, self.first = lifespans, protocol, first
        free: dict[str, Any] = {"price": -math.inf, "multiple": None} if lifespans else {}
        self.policy = HybridPolicy((LayerRule("all", "gated", window),), sinks=sinks, name=name, **free)
        with torch.inference_mode():
            self.tables = [scores(tokens) for tokens in windows]

    def solved(self, footprint: float) -> Any:
        if self.protocol == "once":
            return kept_above(self.tables, footprint, self.first, self.policy)
        tables = torch.stack(self.tables, dim=1)  # [layers, windows, kv_heads, tokens]
        calibration = Calibration(dict(enumerate(tables)), len(tables), tables.shape[-1], self.first, tables.shape[-1])
        found = solve(self.policy, footprint, calibration)
        return found.multiple if self.lifespans else found.price

    @torch.inference_mode()
    def read(self, setting: Any, tokens: Tensor, first: int, count_from: int, prefill: int | None) -> Reading:
        table = self.scores(tokens)
        if prefill is not None:
            ttl = times_once(table, setting, prefill, self.policy)
        else:
            open_figure = {"multiple": setting} if self.lifespans else {"price": setting}
            policy = replace(self.policy, **open_figure)
            ttl = policy.times_to_live(policy.rules[0], table)
        return read_living(self.lm, ttl, tokens, first, count_from, self.policy.rules[0].window or 1, self.policy.sinks)


def read_living(
    lm: Backbone, ttl: Tensor, tokens: Tensor, first: int, count_from: int, window: int = 1, sinks: int = 0
) -> Reading:
    """A text whose keys live as long as a table says; arguments and result as `Contender.read`.

    Args:
        ttl: int64 `[layers, kv_heads, tokens]`.
        window, sinks: tokens that always stay.
    """
    plain = HybridPolicy((LayerRule("all", "window", window),), sinks=sinks)
    with _Tabled(lm.model, None, plain, count_from=count_from) as cache:
        cache.table = ttl
        found = token_losses(lm.model, tokens, first, cache)
        return Reading(*found, cache.footprint, cache.peak_bytes)


def kept_above(tables: Sequence[Tensor], share: float, prefill: int, policy: HybridPolicy) -> float:
    """The price above which that share of a prefill's keys stays, sinks and window included.

    Raises:
        SmartKVError: sinks and window alone are more.
    """
    window, sinks = policy.rules[0].window or 0, policy.sinks
    room = share * prefill - window - sinks
    if room < 0:
        raise SmartKVError(f"{share:.3g} of {prefill} tokens is less than {sinks} sinks and a window of {window}")
    open_keys = torch.cat([table[..., sinks : prefill - window].flatten() for table in tables])
    quantile = 1 - min(1.0, room / (prefill - window - sinks))
    ordered = open_keys.sort().values
    return float(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))])


def times_once(table: Tensor, price: float, prefill: int, policy: HybridPolicy) -> Tensor:
    """TTLs, int64 like `table`, by which the keys of a prefill go at its end, unless they are worth the price."""
    position = torch.arange(table.shape[-1])
    stays = (table >= price) | (position >= prefill - (policy.rules[0].window or 0))
    return torch.where(stays, FOREVER, prefill - position)


class ByGates:
    """Scores from gates, of a text read with a full cache; of several ages the last: to stay for good."""

    def __init__(self, lm: Backbone, gates: GateBank) -> None:
        self.lm, self.gates = lm, gates

    def __call__(self, tokens: Tensor) -> Tensor:
        keys = read_keys(self.lm.model, tokens)
        scores = [self.gates.score(layer, layer_keys)[0].cpu() for layer, layer_keys in enumerate(keys)]
        return torch.stack([score[..., -1] if self.gates.ages else score for score in scores])
