"""Eviction policies as contenders, with gates or without.

There are two protocols. `stream`: keys are evicted while the text is read. `once`: the first `prefill` tokens are read
with a full cache; then each of their keys stays for good or is evicted, and all later keys stay.
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
    """A policy that frees the keys it evicts and packs those that stay if `bits` is given.

    Attributes:
        lm: the model.
        gates: None: the policy asks none.
        policy: its open figures are solved for each footprint.
        calibrate: called when a price is to be solved.
        kind: ours with gates, rule without.
        bits: of keys and of values; None: both stay as they are.
        at_once: see `Decoding`.
    """

    lm: Backbone
    gates: GateBank | None
    policy: HybridPolicy
    calibrate: Callable[[], Calibration]
    kind: str = "ours"
    bits: tuple[int, int] | None = None
    at_once: int | None = None

    @property
    def name(self) -> str:
        """The policy's name, with the bits behind it: `gates+8bit`, `gates+k6v4`."""
        if self.bits is None:
            return self.policy.name
        key, value = self.bits
        return f"{self.policy.name}+{f'{key}bit' if key == value else f'k{key}v{value}'}"

    @property
    def needs(self) -> str:
        """Input at inference; see `Contender`."""
        return "keys" if self.policy.gated else "nothing"

    def solved(self, footprint: float) -> Any:
        """Solve the policy's open figures; see `Contender.solved`."""
        policy = solve(self.policy, footprint, self.calibrate()) if self.policy.open else self.policy
        return policy.to_dict()

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text with a LifespanCache; see `Contender.read`."""
        with self.open(setting, first_query) as cache:
            losses = token_losses(self.lm.model, tokens, first_token, cache)
            cache.settle()
            return Reading(*losses, cache.footprint, cache.peak_bytes, stored_share(self.lm, cache, len(tokens) - 1))

    def open(self, setting: Any, first_query: int) -> LifespanCache:
        """Open a LifespanCache with the solved policy; see `Decoding.open`."""
        policy = HybridPolicy.from_dict(setting)
        gates = self.gates if policy.gated else None
        return LifespanCache(self.lm.model, gates, policy, first_query=first_query, bits=self.bits)
