"""Eviction policies as contenders, with gates or without.

There are two protocols. `stream`: keys are evicted while the text is read. `once`: the first `prefill` tokens are read
with a full cache; then each of their keys stays for good or is evicted, and all later keys stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eval.contenders.base import Reading, held_share, stored_share
from eval.contenders.random_keys import RandomCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.metrics.perplexity import token_losses
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy

BUDGET = "@budget"  # behind a policy's name: its price floats, and the footprint is a budget of the whole text
RANDOM = "random"  # behind it `@budget`: random keys, under the same budget
PINNED = "+pinned"  # behind a name: instruction and question of a prompt stay whatever they are worth
Pins = Sequence[tuple[int, int]]  # first of some tokens, and last + 1


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
        pinned: whether instruction and question of a prompt stay.
    """

    lm: Backbone
    gates: GateBank | None
    policy: HybridPolicy
    calibrate: Callable[[], Calibration]
    kind: str = "ours"
    bits: tuple[int, int] | None = None
    at_once: int | None = None
    pinned: bool = False

    @property
    def name(self) -> str:
        """The policy's name, with the bits behind it: `gates+8bit`, `gates+k6v4`, `gates+k6v4+pinned`."""
        return self.policy.name + bits_in_name(self.bits) + PINNED * self.pinned

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
            return read_with(self.lm, cache, tokens, first_token)

    def open(self, setting: Any, first_query: int, plan: int | None = None, pins: Pins = ()) -> LifespanCache:
        """Open a LifespanCache with the solved policy; see `Decoding.open`.

        Args:
            setting, first_query: as in `Decoding.open`.
            plan: of `BudgetContender.open`; a price that was solved beforehand needs none.
            pins: instruction and question of the prompt, which a contender keeps that is pinned.
        """
        policy = HybridPolicy.from_dict(setting)
        gates = self.gates if policy.gated else None
        cache = LifespanCache(self.lm.model, gates, policy, first_query=first_query, bits=self.bits, rollback=0)
        return pinned_in(cache, pins if self.pinned else ())


@dataclass
class BudgetContender:
    """A policy whose price floats, so that a share of the keys of the whole text is a budget.

    Attributes:
        lm: the model.
        gates: that tell what a key is worth; None: it is drawn at random, the same for every layer.
        policy: its price is open; None without gates.
        bits, at_once, pinned: as in `PolicyContender`.
    """

    lm: Backbone
    gates: GateBank | None
    policy: HybridPolicy | None
    bits: tuple[int, int] | None = None
    at_once: int | None = None
    pinned: bool = False

    @property
    def kind(self) -> str:
        """Ours with gates, null without."""
        return "null" if self.policy is None else "ours"

    @property
    def needs(self) -> str:
        """Input at inference; see `Contender`."""
        return "nothing" if self.policy is None else "keys"

    @property
    def name(self) -> str:
        """The policy's name with `@budget` behind it, and behind that the bits and what is pinned."""
        plain = RANDOM if self.policy is None else self.policy.name
        return plain + BUDGET + bits_in_name(self.bits) + PINNED * self.pinned

    def solved(self, footprint: float) -> Any:
        """Return the budget, which needs no solving; see `Contender.solved`."""
        return {"budget": footprint}

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text whose length is the plan; see `Contender.read`."""
        with self.open(setting, first_query, len(tokens) - 1) as cache:
            return read_with(self.lm, cache, tokens, first_token)

    def open(self, setting: Any, first_query: int, plan: int | None = None, pins: Pins = ()) -> LifespanCache:
        """Open a cache that holds the budget; see `Decoding.open`.

        Args:
            setting, first_query: as in `Decoding.open`.
            plan: tokens of prompt and answer; None: those of the first call.
            pins: instruction and question of the prompt, which a contender keeps that is pinned.
        """
        options: dict[str, Any] = {"first_query": first_query, "bits": self.bits, "rollback": 0}
        options |= {"footprint": setting["budget"], "plan": plan}
        if self.policy is None:
            cache: LifespanCache = RandomCache(self.lm.model, **options)
        else:
            cache = LifespanCache(self.lm.model, self.gates, self.policy, **options)
        return pinned_in(cache, pins if self.pinned else ())


def pinned_in(cache: LifespanCache, pins: Pins) -> LifespanCache:
    """Pin ranges of tokens in a new cache; empty ranges are left out."""
    for start, stop in pins:
        if start < stop:
            cache.pin(start, stop)
    return cache


def bits_in_name(bits: tuple[int, int] | None) -> str:
    """Return what bits of keys and of values add to a contender's name: `+8bit`, `+k6v4`; nothing for None."""
    if bits is None:
        return ""
    key, value = bits
    return f"+{f'{key}bit' if key == value else f'k{key}v{value}'}"


def read_with(lm: Backbone, cache: LifespanCache, tokens: Tensor, first_token: int) -> Reading:
    """Read a text with a new cache and score its tokens; see `Contender.read`."""
    losses, read = token_losses(lm.model, tokens, first_token, cache), len(tokens) - 1
    cache.settle()
    stored, held = stored_share(lm, cache, read), held_share(lm, cache, read)
    return Reading(*losses, cache.footprint, cache.peak_bytes, stored, held)
