"""HybridPolicy: the rule of each layer, and how long a key stays under it.

Query `i` sees key `j` of a layer iff `0 ≤ i − j < max(TTL_j, window)`, or if `j` is a sink. The time to live (TTL)
follows from the layer's rule and is decided once, at the key's birth:

* `window`: a TTL of 0 tokens. Queries see only the last `window` keys and the sinks.
* `gated`: a TTL of `multiple · 4^y` tokens if the gate's prediction `y` exceeds the price, else 0. With an infinite
  multiple (the default) a key whose prediction exceeds the price stays for good. Gates that judge keys for several ages
  predict a worth for each age: the key stays until the first age at which its worth does not exceed the price.
* `full`: an infinite TTL.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.checks import describe
from smartkv.models.architecture import Architecture, Fingerprint, gated_layers
from smartkv.models.layer_ranges import check_ranges, format_layers, parse_layers
from smartkv.policies.capacity import Cap
from smartkv.policies.figures import check_figure, check_tokens, read_fields
from smartkv.policies.lifetimes import FOREVER

Rule = Literal["window", "gated", "full"]
WINDOW_SHARE = 0.6
LOG4_TARGET = "log4 lifespan"  # target of gates whose prediction can be read as a TTL


@dataclass(frozen=True)
class LayerRule:
    """The rule of a range of layers.

    Attributes:
        layers: ranges such as "0-2" or "0-2,20-29"; or "early", "middle" or "late", which scale with the model's depth
            (see `smartkv.models.layer_ranges.depth_ranges`); or "all".
        rule: `window`, `gated` or `full`.
        window: number of latest tokens that always stay, at least 1, since a token sees itself. None: left open, to be
            solved for; or the rule is `full`.
        price: prediction above which a key of these layers stays. None: the policy's price.

    Raises:
        SmartKVError: an unknown rule, or a window or price that does not go with it.
    """

    layers: str
    rule: Rule
    window: int | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if type(self.layers) is int:
            object.__setattr__(self, "layers", str(self.layers))  # of one layer, which YAML reads as a number
        check_ranges(self.layers)
        if self.rule not in get_args(Rule):
            raise SmartKVError(f"rule {describe(self.rule)} is unknown: expected {', '.join(get_args(Rule))}")
        if self.rule == "full" and self.window is not None:
            raise SmartKVError(f"layers {self.layers} keep everything: rule full takes no window")
        if self.window is not None:
            check_tokens(f"window of layers {self.layers}", self.window, least=1)
        if self.rule != "gated" and self.price is not None:
            raise SmartKVError(f"layers {self.layers} have a price but no gates: rule {self.rule} takes none")
        if self.price is not None:
            check_figure(f"price of layers {self.layers}", self.price)


@dataclass(frozen=True)
class HybridPolicy:
    """Rules for all layers of a model.

    Windows, price and multiple may be None. They are then *open*: `smartkv.policies.budgets.solve` finds the values
    that keep a target footprint. Of price and multiple, one at most may be open.

    Attributes:
        rules: each layer of the model belongs to exactly one rule.
        sinks: number of first tokens of a sequence that always stay.
        price: prediction above which a key of a gated layer stays, in the unit of the gates' target. With `-inf` the
            multiple decides, and each key has its own TTL.
        multiple: `c` of `TTL = c · 4^y`. With `inf` a key above the price stays for good.
        window_share: share of the target footprint that open windows get where gates get the rest.
        max_tokens: cap on the number of keys, whatever the rules say (see `smartkv.policies.capacity`); None: no cap.
        max_tokens_per: whether the cap is for each KV head (`head`), or for each layer, whose heads share it (`layer`).
        name: the policy's name in results and messages.

    Raises:
        SmartKVError: a figure out of range or of a wrong type.
    """

    rules: tuple[LayerRule, ...]
    sinks: int = 4
    price: float | None = None
    multiple: float | None = math.inf
    window_share: float = WINDOW_SHARE
    max_tokens: int | None = None
    max_tokens_per: Literal["head", "layer"] = "head"
    name: str = "custom"

    def __post_init__(self) -> None:
        self._check_rules()
        check_tokens("sinks", self.sinks, least=0)
        if self.price is not None:
            check_figure("price", self.price)
        if self.multiple is not None:
            check_figure("multiple", self.multiple)
            if self.multiple <= 0:
                raise SmartKVError(f"multiple must be above 0, got {self.multiple}")
        check_figure("window_share", self.window_share)
        if not 0 < self.window_share < 1:
            raise SmartKVError(f"window_share must lie between 0 and 1, got {self.window_share}")
        if self.max_tokens is not None:
            check_tokens("max_tokens", self.max_tokens, least=1, unit="keys")
        if self.max_tokens_per not in ("head", "layer"):
            raise SmartKVError(f"max_tokens_per must be head or layer, got {describe(self.max_tokens_per)}")
        if not isinstance(self.name, str):
            raise SmartKVError(f"the name of a policy must be text, got {describe(self.name)}: write it in quotes")
        if self.gated and self.price is None and self.multiple is None:
            raise SmartKVError("price and multiple are both open, but only one can be solved for: give one a value")

    def _check_rules(self) -> None:
        if isinstance(self.rules, LayerRule):
            raise SmartKVError(
                "rules must be a tuple, got one LayerRule: write HybridPolicy((LayerRule(…),)), with a comma"
            )
        if not isinstance(self.rules, tuple | list):
            raise SmartKVError(f"rules must be a tuple of LayerRules, got {describe(self.rules)}")
        if not self.rules:
            raise SmartKVError("a policy needs at least one rule")
        if other := [rule for rule in self.rules if not isinstance(rule, LayerRule)]:
            advice = ": read a mapping with HybridPolicy.from_dict(…)" if isinstance(other[0], dict) else ""
            raise SmartKVError(f"rules must be LayerRules, got {describe(other[0])} among them{advice}")
        object.__setattr__(self, "rules", tuple(self.rules))

    @property
    def gated(self) -> bool:
        """Whether any layer asks gates."""
        return any(rule.rule == "gated" for rule in self.rules)

    @property
    def open(self) -> str | None:
        """The open figure that is solved for next: "window", "price" or "multiple"; None: nothing is open."""
        if any(r.window is None and r.rule != "full" for r in self.rules):
            return "window"
        if self.gated and self.price is None and any(r.rule == "gated" and r.price is None for r in self.rules):
            return "price"
        return "multiple" if self.gated and self.multiple is None else None

    def closed(self, value: float) -> "HybridPolicy":
        """Return the same policy with `value` for the figure that is `open`."""
        if self.open == "price":
            return replace(self, price=value)
        if self.open == "multiple":
            return replace(self, multiple=value)
        rules = (r if r.window is not None or r.rule == "full" else replace(r, window=int(value)) for r in self.rules)
        return replace(self, rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping that YAML and JSON can hold and `from_dict` reads."""
        rules = [{k: v for k, v in asdict(rule).items() if v is not None} for rule in self.rules]
        return {
            "name": self.name,
            "sinks": self.sinks,
            "price": self.price,
            "multiple": self.multiple,
            "window_share": self.window_share,
            "max_tokens": self.max_tokens,
            "max_tokens_per": self.max_tokens_per,
            "rules": rules,
        }

    @classmethod
    def from_dict(cls, content: Any) -> "HybridPolicy":
        """Return the policy that a mapping from YAML or JSON describes.

        Raises:
            SmartKVError: an unknown key, or a figure of a wrong type.
        """
        if not isinstance(content, dict) or not isinstance(content.get("rules"), list):
            raise SmartKVError("a policy is a mapping with a list of rules, each with layers and rule")
        figures = read_fields(cls, content, "a policy")
        rules = tuple(LayerRule(**read_fields(LayerRule, rule, "a rule")) for rule in content["rules"])
        return cls(**figures | {"rules": rules})

    @classmethod
    def read(cls, *_: Any, **__: Any) -> "HybridPolicy":
        """Refuse the call: this was the name of `read_policy` in version 0.1.

        Raises:
            SmartKVError: always.
        """
        raise SmartKVError("HybridPolicy.read is now smartkv.read_policy(name_or_file, layers)")

    # -- applied to a model -------------------------------------------------------------------------------------------

    def by_layer(self, layers: int) -> list[LayerRule]:
        """Return the rule of each layer of a model with `layers` layers.

        Raises:
            SmartKVError: ranges that the model does not have, that overlap, or that leave a layer out.
        """
        rule_of: dict[int, LayerRule] = {}
        for rule in self.rules:
            here = parse_layers(rule.layers, layers)
            if twice := sorted(set(here) & set(rule_of)):
                raise SmartKVError(f"policy '{self.name}' has two rules for layers {format_layers(twice)}")
            rule_of |= dict.fromkeys(here, rule)
        if missing := sorted(set(range(layers)) - set(rule_of)):
            raise SmartKVError(f"policy '{self.name}' has no rule for layers {format_layers(missing)}")
        return [rule_of[layer] for layer in range(layers)]

    def rules_for(self, layers: int, sliding_windows: Sequence[int | None] = ()) -> list[LayerRule]:
        """Return the rule of each layer of a model some of whose layers may slide.

        A layer that slides where others see everything has no gates. Where the policy would ask them, the layer keeps
        all that its own window lets it see.

        Args:
            layers: number of layers of the model.
            sliding_windows: as in `Architecture`.

        Raises:
            SmartKVError: as for `by_layer`.
        """
        asked = set(gated_layers(layers, sliding_windows))
        keeps = LayerRule("all", "full")
        return [
            keeps if rule.rule == "gated" and layer not in asked else rule
            for layer, rule in enumerate(self.by_layer(layers))
        ]

    def check(
        self,
        model: Architecture | Fingerprint,
        gates: GateBank | None,
        sliding_windows: Sequence[int | None] | None = None,
    ) -> list[LayerRule]:
        """Return the rule of each layer, after checking that model, gates and policy fit together.

        Args:
            model: architecture or fingerprint of the model.
            gates: the model's gates; None: there are none.
            sliding_windows: as in `Architecture`; None: those of `model`, of which a fingerprint knows none.

        Raises:
            SmartKVError: a layer without a rule or without its gates, or gates that read or predict something else.
        """
        if sliding_windows is None:
            sliding_windows = getattr(model, "sliding_windows", ())
        rules = self.rules_for(model.layers, sliding_windows)
        gated = [layer for layer, rule in enumerate(rules) if rule.rule == "gated"]
        if gated and gates is None:
            raise SmartKVError(f"policy '{self.name}' gates layers {format_layers(gated)}, but no gates were given")
        if gates is not None and (missing := sorted(set(gated) - set(gates.layers))):
            raise SmartKVError(
                f"policy '{self.name}' gates layers {format_layers(missing)}, "
                f"but these gates are for layers {format_layers(gates.layers)}"
            )
        if gated and gates is not None and gates.details.get("inputs", "keys") != "keys":
            raise SmartKVError(
                f"these gates read {gates.details['inputs']}; a cache gives them keys before the rotary embedding"
            )
        if gated and gates is not None and self.multiple not in (None, math.inf):
            target = gates.details.get("target", LOG4_TARGET)
            if target != LOG4_TARGET:
                raise SmartKVError(
                    f"a multiple of a predicted lifespan needs gates that predict {LOG4_TARGET}, these predict {target}"
                )
        return rules

    def caps(self, model: Architecture) -> list[Cap | None]:
        """Return the cap of each layer; None: the layer has none.

        Raises:
            SmartKVError: the cap leaves no room for sinks and window.
        """
        if self.max_tokens is None:
            return [None] * model.layers
        heads = model.kv_heads if self.max_tokens_per == "layer" else 1
        caps: list[Cap | None] = []
        for rule in self.rules_for(model.layers, model.sliding_windows):
            # where keys do not expire, the oldest are dropped first: the cap acts as a window, so it is pinned as one
            window = rule.window or max(1, self.max_tokens // heads - self.sinks)
            room = self.max_tokens - heads * (self.sinks + window)
            if room < 0:
                raise SmartKVError(
                    f"max_tokens {self.max_tokens} a {self.max_tokens_per} leaves no room for the {self.sinks} sinks "
                    f"and the window of {window} tokens of layers {rule.layers}: give at least "
                    f"{heads * (self.sinks + window)}, or a smaller window"
                )
            caps.append(Cap(room, heads, window, self.sinks))
        return caps

    def times_to_live(self, rule: LayerRule, prediction: Tensor | None, ages: Sequence[int] = ()) -> Tensor | int:
        """Return the TTL of each key by a layer's rule, in tokens from 0 to `FOREVER`, the window not considered.

        Args:
            rule: the layer's rule.
            prediction: the gates' prediction for each key, of any shape; read only if the rule is `gated`.
            ages: in tokens, rising, for gates that judge a key for several ages. `prediction` is then `[…, ages]` and
                does not rise with age.

        Returns:
            int64, one TTL per key; or one int for all keys if the rule is not `gated`.

        Raises:
            SmartKVError: the price is open.
        """
        if rule.rule != "gated" or prediction is None:
            return FOREVER if rule.rule == "full" else 0
        price = rule.price if rule.price is not None else self.price
        if price is None:
            raise SmartKVError(f"policy '{self.name}' has no price for layers {rule.layers}: give it, or solve it")
        if ages:
            until = torch.tensor([0, *ages[1:], FOREVER], device=prediction.device)
            return until[(prediction > price).sum(dim=-1)]
        multiple = math.inf if self.multiple is None else self.multiple
        if math.isinf(multiple):
            ttl = torch.full_like(prediction, FOREVER, dtype=torch.int64)
        else:
            ttl = (multiple * torch.pow(4.0, prediction.double())).ceil().clamp(max=FOREVER).long()
        return torch.where(prediction > price, ttl, 0)

    def lifetime(self, rule: LayerRule, ttl: Tensor | int, position: Tensor) -> Tensor:
        """Return how many tokens each key stays visible: `max(TTL, window)`, and `FOREVER` for sinks.

        Args:
            rule: the layer's rule.
            ttl: int64, of each key, or one int for all keys.
            position: int64, each key's index among the real tokens of its row; broadcasts with `ttl`.

        Returns:
            int64, at most `FOREVER`.
        """
        longest = torch.as_tensor(ttl, device=position.device).clamp(min=rule.window or FOREVER)
        return torch.where(position < self.sinks, FOREVER, longest)
