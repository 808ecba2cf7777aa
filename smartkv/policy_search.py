"""`auto`: which window each layer gets, and whether it asks its gates, chosen from data; one price for all heads.

Each layer in turn is given each option while the others stay as they are, and two things are measured on calibration
texts: how far the model's predictions move from the full cache's (KL divergence, nats a token), and what the layer
keeps. What a share of the cache is worth is measured too: how much the divergence falls when the price of all layers
falls a little, over how much more they keep then. Each layer takes the option for which divergence + rate · footprint
is least, and the price is solved anew. (What two layers' changes do together is taken for the sum of what each does
alone.)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.distillation.kl_divergence import divergence
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.layer_ranges import format_layers
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule


@dataclass(frozen=True)
class Trade:
    """What options do, layer by layer.

    Attributes:
        options: a layer's rules to choose from; their `layers` is not read.
        base: index of the option that all layers have while another is tried.
        divergence: float64 `[layers, options]`, nats a token, with that one layer changed.
        footprint: float64 `[layers, options]`, what the layer keeps of its full cache.
        rate: nats a token that a whole cache is worth, where the price stands.
    """

    options: tuple[LayerRule, ...]
    base: int
    divergence: Tensor
    footprint: Tensor
    rate: float

    def choose(self) -> Tensor:
        """Each layer's option, int64 `[layers]`."""
        return (self.divergence + self.rate * self.footprint / len(self.footprint)).argmin(dim=1)


@torch.inference_mode()
def measure_trade(
    model: PreTrainedModel,
    gates: GateBank | None,
    policy: HybridPolicy,
    nearby: Sequence[HybridPolicy],
    options: Sequence[LayerRule],
    windows: Sequence[Tensor],
    first_query: int,
    tracked: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Trade:
    """Try each option in each layer.

    Args:
        policy: with one rule for all layers, nothing open; that rule is one of the options.
        nearby: the same with a higher and with a lower price.
        options: their `layers` is not read; those that ask gates share the policy's price.
        windows: calibration texts, ids `[tokens]` each.
        first_query: queries from this one on count.
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
    teachers = [_hidden(model, ids, None)[first_query:] for ids in windows]
    head = model.get_output_embeddings()

    def read(tried: HybridPolicy) -> tuple[float, Tensor]:
        lost, by_layer = 0.0, torch.zeros(layers, dtype=torch.float64)
        for ids, teacher in zip(windows, teachers, strict=True):
            with LifespanCache(model, gates, tried, first_query=first_query) as cache:
                hidden = _hidden(model, ids, cache)[first_query:]
                by_layer += cache.footprint_by_head.mean(dim=1).cpu() / len(windows)
            lost += float(divergence(hidden, teacher, head)) / len(windows)
        return lost, by_layer

    moved[:, base], kept[:, base] = read(policy)
    dear, cheap = sorted((read(each) for each in nearby), key=lambda found: float(found[1].mean()))
    room = float((cheap[1] - dear[1]).mean())
    rate = max(0.0, (dear[0] - cheap[0]) / room) if room > 0 else 0.0
    for layer in tracked(range(layers)):
        others = format_layers([other for other in range(layers) if other != layer])
        for number, option in enumerate(everywhere):
            if number == base:
                continue
            own = replace(option, layers=str(layer))
            rest = (replace(policy.rules[0], layers=others),) if others else ()
            moved[layer, number], by_layer = read(replace(policy, rules=(own, *rest)))
            kept[layer, number] = by_layer[layer]
    return Trade(everywhere, base, moved, kept, rate)


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
    chosen = trade.choose().tolist()
    rules = []
    for number in sorted(set(chosen)):
        own = [layer for layer, option in enumerate(chosen) if option == number]
        rules.append(replace(trade.options[number], layers=format_layers(own)))
    found = replace(policy, rules=tuple(rules), name="auto")
    return solve(replace(found, price=None), footprint, calibration) if found.gated else found
