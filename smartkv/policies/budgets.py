"""Open figures of a policy, solved for a target footprint on calibration text.

The gates' predictions alone say which keys are visible to which queries. So the language model runs once over each
calibration window with a full cache, and the figure is found by bisection over the predictions. Under eviction the keys
of later layers differ a little from those of the full cache; what a cache really kept is measured where it is used.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.checks import describe
from smartkv.models.architecture import check_model
from smartkv.models.key_hooks import read_keys
from smartkv.models.wrappers import language_model
from smartkv.policies.arguments import (
    check_counted,
    check_footprint,
    check_windows,
    resolve_gates,
    resolve_policy,
)
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER

STEPS = 32  # of bisection, more than float32 predictions can distinguish


@dataclass(frozen=True)
class Calibration:
    """The gates' predictions for the keys of some windows of text.

    Attributes:
        predictions: of each gated layer, float32 `[windows, kv_heads, tokens]`, or `[…, ages]` from gates that judge
            for ages.
        layers: number of layers of the model.
        tokens: length of a window.
        first_query: position of the first counted query.
        last: position after the last counted query. It is `tokens - 1`: the query at `tokens - 2` predicts the window's
            last token, and the query of that token predicts none in the window.
        ages: in tokens, for which the gates judge; empty for gates that judge once and for all.
        sliding_windows: of the model itself, as in `Architecture`.
    """

    predictions: dict[int, Tensor]
    layers: int
    tokens: int
    first_query: int
    last: int
    ages: tuple[int, ...] = ()
    sliding_windows: Sequence[int | None] = ()

    @classmethod
    @torch.inference_mode()
    def measure(
        cls,
        model: PreTrainedModel,
        gates: GateBank | str | Path | None,
        windows: Iterable[Tensor],
        first_query: int = 0,
    ) -> "Calibration":
        """Run a model over windows of text with a full cache, and read its keys with the gates.

        Args:
            model: a loaded causal LM of a supported family, or a wrapper of one.
            gates: the model's gates, given as for `LifespanCache`; None for policies that need none.
            windows: token ids, integers `[tokens]`, all of one length; or one tensor `[windows, tokens]`.
            first_query: position of the first counted query. The last counted query is the one that predicts the last
                token.

        Raises:
            SmartKVError: an argument of a wrong type, gates of another model, windows of unequal lengths or longer than
                the model's positions, no window, or no query that counts.
        """
        architecture, bank = check_model(model), resolve_gates(model, gates)
        ids = check_windows(windows, language_model(model).config.vocab_size)
        tokens = check_counted([len(window) for window in ids], first_query)
        if tokens > architecture.max_positions:
            raise SmartKVError(
                f"windows of {tokens} tokens are longer than the model's {architecture.max_positions} positions: "
                "make them shorter"
            )
        own = architecture.sliding_windows
        if bank is not None:
            return cls.of(bank, [read_keys(model, window) for window in ids], first_query, own)
        return cls.without_gates(architecture.layers, tokens, first_query, own)

    @classmethod
    def without_gates(
        cls, layers: int, tokens: int, first_query: int = 0, sliding_windows: Sequence[int | None] = ()
    ) -> "Calibration":
        """Return a calibration for policies without gates, which keep the same in every window of `tokens`.

        Raises:
            SmartKVError: no query that counts.
        """
        check_counted([tokens], first_query)
        return cls({}, layers, tokens, first_query, tokens - 1, sliding_windows=sliding_windows)

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        gates: GateBank,
        keys: list[list[Tensor]],
        first_query: int = 0,
        sliding_windows: Sequence[int | None] = (),
    ) -> "Calibration":
        """Return a calibration from pre-RoPE keys that were read before.

        Args:
            gates: the model's gates.
            keys: of each window, of each layer `[1, kv_heads, tokens, head_dim]`.
            first_query: as in `measure`.
            sliding_windows: of the model itself, as in `Architecture`.

        Raises:
            SmartKVError: something else than gates, no window, or no query that counts.
        """
        if not isinstance(gates, GateBank):
            raise SmartKVError(f"gates must be a GateBank here, got {describe(gates)}: give their name to `measure`")
        tokens = check_counted([window[0].shape[2] for window in keys], first_query)
        predictions = {
            layer: torch.cat([gates.score(layer, window[layer]).cpu() for window in keys]) for layer in gates.layers
        }
        layers, last = gates.fingerprint.layers, tokens - 1
        return cls(predictions, layers, tokens, first_query, last, gates.ages, sliding_windows)

    def footprint(self, policy: HybridPolicy | str | Path) -> float:
        """Return the share of the full cache's keys that the counted queries see, over layers, heads and windows.

        Args:
            policy: a policy with nothing open, its name, or a YAML file (see `read_policy`).

        Raises:
            SmartKVError: an argument of a wrong type, a policy that gates a layer without predictions, or one that
                leaves something open.
        """
        policy = resolve_policy(policy, self.layers)
        if policy.open:
            raise SmartKVError(
                f"policy '{policy.name}' leaves its {policy.open} open, so it has no footprint yet: give it a value, "
                "or solve it, solve(policy, 0.25, calibration)"
            )
        rules = policy.rules_for(self.layers, self.sliding_windows)
        counts = [self._layer(policy, rule, layer) for layer, rule in enumerate(rules)]
        return sum(visible for visible, _ in counts) / sum(full for _, full in counts)

    def layer_shares(self, policy: HybridPolicy) -> list[float]:
        """Return for each layer the share of its own full cache's keys that the counted queries see.

        Args:
            policy: a policy with nothing open.
        """
        rules = policy.rules_for(self.layers, self.sliding_windows)
        counts = [self._layer(policy, rule, layer) for layer, rule in enumerate(rules)]
        return [visible / full for visible, full in counts]

    def _layer(self, policy: HybridPolicy, rule: LayerRule, layer: int) -> tuple[float, float]:
        """Return the keys that the counted queries see in a layer, mean over heads and windows, and in a full cache."""
        position = torch.arange(self.tokens)
        if rule.rule == "gated" and layer not in self.predictions:
            raise SmartKVError(f"policy '{policy.name}' gates layer {layer}, but there are no gates for it")
        ttl = policy.times_to_live(rule, self.predictions.get(layer), self.ages)
        own = (self.sliding_windows[layer] if self.sliding_windows else None) or FOREVER
        lifetime = policy.lifetime(rule, ttl, position).clamp(max=own)
        visible = self._queries(position, (position + lifetime).clamp(max=self.last))
        full = self._queries(position, (position + own).clamp(max=self.last))
        return float(visible.double().reshape(-1, self.tokens).mean(dim=0).sum()), float(full.sum())

    def _queries(self, born: Tensor, end: Tensor) -> Tensor:
        """Return the number of counted queries in `[born, end)`."""
        return (end - born.clamp(min=self.first_query)).clamp(min=0)


def solve(policy: HybridPolicy | str | Path, footprint: float, calibration: Calibration) -> HybridPolicy:
    """Give a policy's open figures (windows, price or multiple) the values that keep a target footprint.

    Where both windows and the gates' figure are open, the windows get `policy.window_share` of the footprint and the
    gates the rest.

    Args:
        policy: a policy with something open, its name, or a YAML file (see `read_policy`).
        footprint: share of the full cache's keys to keep, above 0 and at most 1.
        calibration: predictions on the text for which the footprint shall hold.

    Returns:
        The policy with nothing open.

    Raises:
        FootprintOutOfReach: no value of the open figure gives this footprint.
        SmartKVError: an argument of a wrong type, nothing is open, the policy has a cap, or the footprint is no share.
    """
    check_footprint(footprint)
    if not isinstance(calibration, Calibration):
        raise SmartKVError(
            f"calibration must be a Calibration, got {describe(calibration)}: write "
            "Calibration.measure(model, gates, windows) with token ids as windows"
        )
    policy = resolve_policy(policy, calibration.layers)
    if policy.gated and not calibration.predictions:
        raise SmartKVError(
            f"policy '{policy.name}' asks gates, but the calibration was measured without any: write "
            "Calibration.measure(model, gates, windows)"
        )
    if policy.max_tokens is not None:
        raise SmartKVError(f"policy '{policy.name}' has a cap: it keeps max_tokens, not a share of the cache")
    if policy.open is None:
        raise SmartKVError(f"policy '{policy.name}' leaves nothing open that could be solved for a footprint")
    if policy.open == "window":
        if not policy.gated:
            return _bisect(policy, footprint, calibration, 1, calibration.tokens)
        # the windows are solved as if the gates kept nothing
        alone = replace(policy, rules=tuple(replace(r, price=None) for r in policy.rules), price=math.inf, multiple=1.0)
        share = _bisect(alone, footprint, calibration, 1, calibration.tokens, policy.window_share)
        windows = [rule.window for rule in share.rules]
        rules = (replace(rule, window=window) for rule, window in zip(policy.rules, windows, strict=True))
        policy = replace(policy, rules=tuple(rules))
    if policy.open == "multiple":
        return _bisect(policy, footprint, calibration, 1e-6, 1e9)
    if policy.open is None:
        return policy
    lowest = torch.stack([prediction.min() for prediction in calibration.predictions.values()]).min()
    highest = max(float(prediction.max()) for prediction in calibration.predictions.values())
    below = float(lowest.nextafter(torch.full_like(lowest, -math.inf)))  # all float32 predictions exceed it
    return _bisect(policy, footprint, calibration, highest, below)  # a lower price keeps more


def _bisect(
    policy: HybridPolicy, footprint: float, calibration: Calibration, low: float, high: float, share: float = 1.0
) -> HybridPolicy:
    """Find the value of the open figure that keeps as much as possible and at most `share` of the footprint.

    Footprints grow from `low` to `high`, which need not be the smaller and the larger number.
    """
    smallest, largest = (calibration.footprint(policy.closed(value)) / share for value in (low, high))
    if not smallest <= footprint <= largest:
        if footprint < smallest:
            advice = "give a larger footprint, longer windows of text, or a policy with smaller windows or fewer sinks"
        else:
            advice = "give a smaller footprint; policy 'full' keeps everything"
        raise FootprintOutOfReach(
            f"policy '{policy.name}' cannot keep {footprint:.3g} of the cache: "
            f"with its {policy.open} open it keeps {smallest:.3g} to {min(largest, 1.0):.3g}; {advice}"
        )
    if footprint == largest:
        return policy.closed(high)
    for _ in range(STEPS):
        middle = math.sqrt(low * high) if policy.open == "multiple" else (low + high) / 2
        if calibration.footprint(policy.closed(middle)) > share * footprint:
            high = middle
        else:
            low = middle
    return policy.closed(low)


FOOTPRINTS = tuple(2 ** (-half / 2) for half in range(1, 10))  # 0.71 … 0.044, for which gates remember a price


def price_curve(policy: HybridPolicy, calibration: Calibration) -> list[list[float]]:
    """Return [footprint, price] for each of `FOOTPRINTS` that the policy can keep: the prices that gates remember."""
    curve = []
    for footprint in FOOTPRINTS:
        try:
            solved = solve(policy, footprint, calibration)
        except FootprintOutOfReach:  # the windows alone keep more
            continue
        if solved.price is not None:
            curve.append([footprint, solved.price])
    return curve


def solved_details(policy: HybridPolicy, calibration: Calibration) -> dict[str, Any]:
    """Return what gates remember of a calibration: prices, and what each layer keeps at them.

    Returns:
        `prices` as from `price_curve`, and `layer_shares`: for each of the prices [footprint, shares], where the shares
        are those of `Calibration.layer_shares`, rounded to 4 decimals.
    """
    prices = price_curve(policy, calibration)
    shares = [
        [footprint, [round(share, 4) for share in calibration.layer_shares(replace(policy, price=price))]]
        for footprint, price in prices
    ]
    return {"prices": prices, "layer_shares": shares}


def how_to_solve(footprint: float | None = None, policy: str = "'all-gated'", gates: str = "gates") -> str:
    """Return the call that solves a policy on a user's own text, for error messages.

    Args:
        footprint: share of the full cache in the call; None: a quarter.
        policy, gates: their Python expressions in the call.
    """
    share = 0.25 if footprint is None else footprint
    return f"policy=solve({policy}, {share:g}, Calibration.measure(model, {gates}, windows)) with token ids as windows"


def policy_of(gates: GateBank, footprint: float) -> HybridPolicy:
    """Return the policy that gates remember from their training, with the price of a footprint.

    The prices were solved on windows of the training text. On other text, or on longer text, the same price keeps
    another share. To solve prices on your own text, build a `Calibration` and call `solve`.

    Args:
        gates: gates that were exported with a policy and its prices.
        footprint: share of the full cache's keys to keep, within the footprints that the gates have prices for.

    Raises:
        FootprintOutOfReach: the gates remember no price for this footprint.
        SmartKVError: the gates remember no policy or no prices.
    """
    if not isinstance(gates, GateBank):
        raise SmartKVError(
            f"policy_of expected gates, got {type(gates).__name__}: load them with GateBank.from_pretrained, "
            f"or give a cache gates and footprint={footprint!r}"
        )
    check_footprint(footprint)
    curve = sorted(gates.details.get("prices", []))
    if footprint == 1:
        way = "policy='full' keeps all keys, and needs no gates"
    else:
        way = f"solve a policy on your own text, {how_to_solve(footprint)}"
    if "policy" not in gates.details or not curve:
        raise SmartKVError(f"these gates remember no policy with prices: {way}")
    policy = HybridPolicy.from_dict(gates.details["policy"])
    least, most = curve[0][0], curve[-1][0]
    if not least <= footprint <= most:
        raise FootprintOutOfReach(
            f"these gates have prices for footprints from {least:.3g} to {most:.3g}, not for {footprint}: "
            + (way if footprint == 1 else f"give one of these, or {way}")
        )
    for (low, dear), (high, cheap) in pairwise(curve):
        if footprint < high:
            share = math.log(footprint / low) / math.log(high / low)
            return replace(policy, price=dear + share * (cheap - dear))
    return replace(policy, price=curve[-1][1])
