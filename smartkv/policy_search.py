"""Search of a policy from data: a rule and a window for each layer, and one price for all heads.

Each layer in turn is given each option, while the other layers keep the rule to start from. Two figures are measured on
calibration texts: the KL divergence of the model's predictions from those with a full cache (nats per token), and the
share of keys that the layer keeps. The exchange rate between the two is measured as well: the price of all layers is
changed a little, and the fall of the divergence is divided by the rise of the footprint. Each layer then takes the
option with the smallest divergence + rate · footprint, and the price is solved again. The search assumes that the
changes of layers add up.
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
from smartkv.models.architecture import check_model
from smartkv.models.layer_ranges import format_layers
from smartkv.models.wrappers import input_device
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule


@dataclass(frozen=True)
class Trade:
    """The measured effect of each option in each layer.

    Attributes:
        options: Rules to choose from. Their `layers` is not read.
        base: Index of the option that the other layers have.
        divergence: Divergence in nats per token with one layer changed, float64 `[layers, options]`.
        footprint: Share of its full cache that the layer keeps, float64 `[layers, options]`.
        rate: Worth of a whole cache at the current price, in nats per token.
    """

    options: tuple[LayerRule, ...]
    base: int
    divergence: Tensor
    footprint: Tensor
    rate: float

    def choose(self) -> Tensor:
        """Choose the best option of each layer, as indices int64 `[layers]`."""
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
    """Measure each option in each layer.

    Args:
        model: The model.
        gates: Its gates. None if no option asks gates.
        policy: The policy to start from. It has one rule for all layers, which is one of the options, and a price.
        nearby: The same policy with a higher and with a lower price.
        options: Rules to try. Their `layers` is not read. Those that ask gates share the policy's price.
        windows: Calibration texts, token ids `[tokens]` each.
        first_query: Index of the first query that counts.
        tracked: Wraps the loop over layers, for a progress bar.

    Raises:
        SmartKVError: The policy has several rules, or one that is not among the options.
    """
    everywhere = tuple(replace(option, layers="all") for option in options)
    if len(policy.rules) != 1 or policy.rules[0] not in everywhere:
        raise SmartKVError(
            "the policy to start from must have one rule for all layers, which is one of the options: got "
            + ", ".join(f"{rule.rule} {rule.window} in layers {rule.layers}" for rule in policy.rules)
        )
    base = everywhere.index(policy.rules[0])
    layers = check_model(model).layers
    shape = (layers, len(everywhere))
    divergences, footprints = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    teachers = [_last_hidden(model, ids, None)[first_query:] for ids in windows]
    head = model.get_output_embeddings()

    def measure(tried: HybridPolicy) -> tuple[float, Tensor]:
        """Measure the divergence of a policy, and the footprint of each layer."""
        mean_divergence, by_layer = 0.0, torch.zeros(layers, dtype=torch.float64)
        for ids, teacher in zip(windows, teachers, strict=True):
            with LifespanCache(model, gates, tried, first_query=first_query, rollback=0) as cache:
                hidden = _last_hidden(model, ids, cache)[first_query:]
                by_layer += cache.footprint_by_head.mean(dim=1).cpu() / len(windows)
            mean_divergence += float(divergence(hidden, teacher, head)) / len(windows)
        return mean_divergence, by_layer

    divergences[:, base], footprints[:, base] = measure(policy)
    measured = [measure(each) for each in nearby]
    (dear_divergence, dear_footprint), (cheap_divergence, cheap_footprint) = sorted(
        measured, key=lambda pair: float(pair[1].mean())
    )
    gain = float((cheap_footprint - dear_footprint).mean())
    rate = max(0.0, (dear_divergence - cheap_divergence) / gain) if gain > 0 else 0.0
    for layer in tracked(range(layers)):
        others = format_layers([other for other in range(layers) if other != layer])
        for number, option in enumerate(everywhere):
            if number == base:
                continue
            own = replace(option, layers=str(layer))
            rest = (replace(policy.rules[0], layers=others),) if others else ()
            divergences[layer, number], by_layer = measure(replace(policy, rules=(own, *rest)))
            footprints[layer, number] = by_layer[layer]
    return Trade(everywhere, base, divergences, footprints, rate)


def _last_hidden(model: PreTrainedModel, ids: Tensor, cache: LifespanCache | None) -> Tensor:
    ids = ids.long().to(input_device(model))[None]
    output = model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def auto_policy(trade: Trade, policy: HybridPolicy, footprint: float, calibration: Calibration) -> HybridPolicy:
    """Make the policy with the chosen rule of each layer and solve its price for a footprint.

    Args:
        trade: Measured effects of the options.
        policy: The policy that was started from, whose sinks are kept.
        footprint: Share of the full cache's keys.
        calibration: Predictions of the gates on calibration texts.

    Returns:
        A policy named "auto". It has no price if no layer asks its gates.

    Raises:
        FootprintOutOfReach: The rules cannot keep the footprint.
    """
    chosen = trade.choose().tolist()
    rules = []
    for number in sorted(set(chosen)):
        own = [layer for layer, option in enumerate(chosen) if option == number]
        rules.append(replace(trade.options[number], layers=format_layers(own)))
    chosen_policy = replace(policy, rules=tuple(rules), name="auto")
    if not chosen_policy.gated:
        return chosen_policy
    return solve(replace(chosen_policy, price=None), footprint, calibration)
