"""Who is compared: gates by their policies, plain rules, nulls, and oracles, each read in one forward pass.

Two protocols. `stream`: keys go while the text is read. `once`: the first `prefill` tokens are read with a full cache,
then each of their keys stays for good or goes, and all later ones stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eval.contenders.base import Reading, stored_share
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.metrics.perplexity import token_losses
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy


@dataclass
class PolicyContender:
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

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        with self.open(setting, first_query) as cache:
            found = token_losses(self.lm.model, tokens, first_token, cache)
            cache.settle()
            return Reading(*found, cache.footprint, cache.peak_bytes, stored_share(self.lm, cache, len(tokens) - 1))

    def open(self, setting: Any, first_query: int) -> LifespanCache:
        policy = HybridPolicy.from_dict(setting)
        gates = self.gates if policy.gated else None
        return LifespanCache(self.lm.model, gates, policy, first_query=first_query, bits=self.bits)
