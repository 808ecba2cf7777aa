"""`auto`: which window each layer gets, and whether it asks its gates, chosen from data; one price for all heads.

Each layer in turn is given each option while the others stay as they are, and two things are measured on calibration
texts: how far the model's predictions move from the full cache's (KL divergence, nats a token), and what the layer
keeps. Then all layers choose at one rate of exchange, nats for the whole cache, which is set by the target footprint:
the sum over layers of divergence + rate · footprint is least. (What two layers' changes do together is taken for the
sum of what each does alone.)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.budgets import Calibration, solve
from smartkv.cache import LifespanCache
from smartkv.distillation import divergence
from smartkv.errors import SmartKVError
from smartkv.gates import GateBank, format_layers
from smartkv.policies import HybridPolicy, LayerRule

STEPS = 60  # of bisection


@dataclass(frozen=True)
class Trade:
    """What options do, layer by layer.

    Attributes:
        options: a layer's rules to choose from; their `layers` is not read.
        base: index of the option that all layers have while another is tried.
        divergence: float64 `[layers, options]`, nats a token, with that one layer changed.
        footprint: float64 `[layers, options]`, what the layer keeps of its full cache.
    """

    options: tuple[LayerRule, ...]
    base: int
    divergence: Tensor
    footprint: Tensor

    def choose(self, footprint: float) -> Tensor:
        """Each layer's option, int64 `[layers]`, such that they keep that footprint at most.

        Raises:
            SmartKVError: no choice keeps so little.
        """
        if float(self.footprint.amin(dim=1).mean()) > footprint:
            raise SmartKVError(f"no choice of windows keeps as little as {footprint:.3g} of the cache")
        low, high = 0.0, 1e6  # nats for the whole cache; a dearer cache is a smaller one
        for _ in range(STEPS):
            middle = (low * high) ** 0.5 if low else high / 1e3
            chosen = self._at(middle)
            kept = float(self.footprint.gather(1, chosen[:, None]).mean())
            low, high = (middle, high) if kept > footprint else (low, middle)
        return self._at(high)

    def _at(self, rate: float) -> Tensor:
        return (self.divergence + rate * self.footprint / len(self.footprint)).argmin(dim=1)


@torch.inference_mode()
def measure_trade(
    model: PreTrainedModel,
    gates: GateBank | None,
    policy: HybridPolicy,
    options: Sequence[LayerRule],
    windows: Sequence[Tensor],
    first: int,
    tracked: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Trade:
    """Try each option in each layer.

    Args:
        policy: with one rule for all layers, nothing open; that rule is one of the options.
        options: their `layers` is not read; those that ask gates share the policy's price.
        windows: calibration texts, ids `[tokens]` each.
        first: queries from this one on count.
        tracked: wraps the loop over layers, for a progress bar.

    Raises:
        SmartKVError: a policy with several rules, or one that is not among the options.
    """
    everywhere = tuple(replace(option, layers="all") for option in options)
    if len(policy.rules) != 1 or policy.rules[0] not in everywhere:
        raise SmartKVError("the policy to start from has one rule for all layers, which is one of the options")
    base = everywhere.index(policy.rules[0])
    layers = model.config.num_hidden_layers
    shape = (layers, len(everywhere))
    moved, kept = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    teachers = [_hidden(model, ids, None)[first:] for ids in windows]
    head = model.get_output_embeddings()
    for layer in tracked(range(layers)):
        others = format_layers([other for other in range(layers) if other != layer])
        for number, option in enumerate(everywhere):
            if number == base and layer:
                moved[layer, base] = moved[0, base]  # the same policy
            rules = (
                replace(option, layers=str(layer)),
                *((replace(policy.rules[0], layers=others),) if others else ()),
            )
            tried = replace(policy, rules=rules)
            for ids, teacher in zip(windows, teachers, strict=True):
                if number == base and layer:
                    continue
                with LifespanCache(model, gates, tried, count_from=first) as cache:
                    hidden = _hidden(model, ids, cache)[first:]
                    kept_by_layer = cache.footprint_by_head.mean(dim=1)
                moved[layer, number] += float(divergence(hidden, teacher, head)) / len(windows)
                kept[layer, number] += float(kept_by_layer[layer]) / len(windows)
                if number == base:
                    kept[1:, base] += kept_by_layer[1:] / len(windows)
    return Trade(everywhere, base, moved, kept)


def _hidden(model: PreTrainedModel, ids: Tensor, cache: LifespanCache | None) -> Tensor:
    ids = ids.long().to(model.device)[None]
    output = model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def auto_policy(trade: Trade, policy: HybridPolicy, footprint: float, calibration: Calibration) -> HybridPolicy:
    """The policy with each layer's chosen rule, and its price solved for that footprint.

    Raises:
        SmartKVError: the footprint is out of reach.
    """
    chosen = trade.choose(footprint).tolist()
    rules = []
    for number in sorted(set(chosen)):
        own = [layer for layer, option in enumerate(chosen) if option == number]
        rules.append(replace(trade.options[number], layers=format_layers(own)))
    found = replace(policy, rules=tuple(rules), name="auto")
    return solve(replace(found, price=None), footprint, calibration) if found.gated else found
