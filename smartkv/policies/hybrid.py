"""HybridPolicy: which rule each layer follows, and how long a key stays by it.

Key `j` of a layer is visible to query `i` iff `0 ≤ i − j < max(TTL_j, window)`, or `j` is a sink. The TTL follows from
the layer's rule, once, at the key's birth:

* `window`: 0 tokens. Only the last `window` keys and the sinks are seen.
* `gated`: `multiple · 4^y` tokens where the gate's prediction `y` exceeds the price, else 0. With the multiple at
  infinity (the default) a key that is worth its price when it leaves the window stays for good. Gates that judge keys
  for several ages say what a key is worth from each age on: it stays until the first at which that is not its price.
* `full`: for good.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.layer_ranges import format_layers, parse_layers
from smartkv.policies.capacity import Cap
from smartkv.policies.lifetimes import FOREVER

Rule = Literal["window", "gated", "full"]
WINDOW_SHARE = 0.6
LOG4_TARGET = "log4 lifespan"  # of gates whose prediction can be read as a TTL


@dataclass(frozen=True)
class LayerRule:
    """What a range of layers keeps.

    Attributes:
        layers: ranges such as "0-2" or "0-2,20-29"; "all".
        rule: window, gated or full.
        window: tokens that stay in any case, at least 1 (a token sees itself); None: to be solved for (or rule full).
        price: of this range alone: the prediction above which a key stays; None: the policy's.
    """

    layers: str
    rule: Rule
    window: int | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise SmartKVError(f"rule '{self.rule}' is unknown: expected {', '.join(get_args(Rule))}")
        if self.window is not None and (isinstance(self.window, bool) or not isinstance(self.window, int)):
            raise SmartKVError(f"window of layers {self.layers} must be a number of tokens, got {self.window!r}")
        if self.window is not None and self.window < 1:
            raise SmartKVError(f"window of layers {self.layers} must be at least 1 token, got {self.window}")
        if self.rule == "full" and self.window is not None:
            raise SmartKVError(f"layers {self.layers} keep everything: rule full takes no window")
        if self.rule != "gated" and self.price is not None:
            raise SmartKVError(f"layers {self.layers} have a price but no gates: rule {self.rule} takes none")


@dataclass(frozen=True)
class HybridPolicy:
    """Rules for all layers of a model.

    What is None is solved for a target footprint (`smartkv.policies.budgets.solve`): the price or the multiple, and
    windows.

    Attributes:
        rules: each layer in exactly one of them.
        sinks: tokens at the start of a sequence that are always kept.
        price: prediction above which a key of a gated layer stays, in the unit of the gates' target; `-inf`: each key
            has its own TTL (then the multiple decides).
        multiple: `c` of `TTL = c · 4^y`; inf: for good.
        window_share: of a target footprint, what open windows take where gates have the rest.
        max_tokens: keys that are kept at most, whatever the rules say (see `smartkv.policies.capacity`); None: no cap.
        max_tokens_per: what the cap is for: each KV head, or each layer, whose heads then share it.
        name: what results call it.

    Raises:
        SmartKVError: figures that mean nothing.
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
        if not self.rules:
            raise SmartKVError("a policy needs at least one rule")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise SmartKVError(f"sinks must be a number of tokens, 0 or more, got {self.sinks!r}")
        if self.multiple is not None and not self.multiple > 0:
            raise SmartKVError(f"multiple must be above 0, got {self.multiple}")
        if self.price is not None and math.isnan(self.price):
            raise SmartKVError("price must be a number, got NaN")
        if not 0 < self.window_share < 1:
            raise SmartKVError(f"window_share must lie between 0 and 1, got {self.window_share}")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise SmartKVError(f"max_tokens must be a number of keys, at least 1, got {self.max_tokens!r}")
        if self.max_tokens_per not in ("head", "layer"):
            raise SmartKVError(f"max_tokens_per must be head or layer, got {self.max_tokens_per!r}")
        if self.gated and self.price is None and self.multiple is None:
            raise SmartKVError("a policy can be solved for its price or for its multiple: give one of them a value")

    @property
    def gated(self) -> bool:
        """Whether any layer asks gates."""
        return any(rule.rule == "gated" for rule in self.rules)

    @property
    def open(self) -> str | None:
        """What is to be solved for next: window, price, multiple, or nothing."""
        if any(r.window is None and r.rule != "full" for r in self.rules):
            return "window"
        if self.gated and self.price is None and any(r.rule == "gated" and r.price is None for r in self.rules):
            return "price"
        return "multiple" if self.gated and self.multiple is None else None

    def closed(self, value: float) -> "HybridPolicy":
        """The same policy with what is `open` given."""
        if self.open == "price":
            return replace(self, price=value)
        if self.open == "multiple":
            return replace(self, multiple=value)
        rules = (r if r.window is not None or r.rule == "full" else replace(r, window=int(value)) for r in self.rules)
        return replace(self, rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, and YAML and JSON can hold."""
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
        """
        Raises:
            SmartKVError: an unknown key, or a figure of the wrong kind.
        """
        if not isinstance(content, dict) or not isinstance(content.get("rules"), list):
            raise SmartKVError("a policy is a mapping with a list of rules, each with layers and rule")
        try:
            rules = tuple(LayerRule(**_known(LayerRule, rule, "a rule")) for rule in content["rules"])
            figures = {k: v for k, v in _known(cls, content, "a policy").items() if k != "rules"}
            for name in ("price", "multiple", "window_share"):
                if figures.get(name) is not None:
                    figures[name] = float(figures[name])
            return cls(rules, **figures)
        except (TypeError, ValueError) as error:
            raise SmartKVError(f"the policy cannot be read: {error}") from error

    # -- for a model ----------------------------------------------------------------------------------------------

    def by_layer(self, layers: int) -> list[LayerRule]:
        """The rule of each of a model's layers.

        Raises:
            SmartKVError: ranges that the model does not have, overlap, or leave a layer out.
        """
        found: dict[int, LayerRule] = {}
        for rule in self.rules:
            here = parse_layers(rule.layers, layers)
            if twice := sorted(set(here) & set(found)):
                raise SmartKVError(f"policy '{self.name}' has two rules for layers {format_layers(twice)}")
            found |= dict.fromkeys(here, rule)
        if missing := sorted(set(range(layers)) - set(found)):
            raise SmartKVError(f"policy '{self.name}' has no rule for layers {format_layers(missing)}")
        return [found[layer] for layer in range(layers)]

    def check(self, model: Architecture | Fingerprint, gates: GateBank | None) -> list[LayerRule]:
        """The rule of each layer, when model, gates and policy fit together.

        Raises:
            SmartKVError: what does not fit.
        """
        rules = self.by_layer(model.layers)
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
        """The cap of each layer; None: none.

        Raises:
            SmartKVError: it leaves no room for sinks and window.
        """
        if self.max_tokens is None:
            return [None] * model.layers
        heads = model.kv_heads if self.max_tokens_per == "layer" else 1
        found: list[Cap | None] = []
        for rule in self.by_layer(model.layers):
            # where keys do not expire the oldest go first: the cap is a window, which may as well be pinned
            window = rule.window or max(1, self.max_tokens // heads - self.sinks)
            room = self.max_tokens - heads * (self.sinks + window)
            if room < 0:
                raise SmartKVError(
                    f"max_tokens {self.max_tokens} a {self.max_tokens_per} leaves no room for the {self.sinks} sinks "
                    f"and the window of {window} tokens of layers {rule.layers}: give at least "
                    f"{heads * (self.sinks + window)}, or a smaller window"
                )
            found.append(Cap(room, heads, window, self.sinks))
        return found

    def times_to_live(self, rule: LayerRule, prediction: Tensor | None, ages: Sequence[int] = ()) -> Tensor | int:
        """TTL in tokens by a layer's rule, from 0 to `FOREVER`; the window comes on top of it.

        Args:
            rule: of the layer.
            prediction: of the layer's gates, one a key, any shape; not read unless the rule is gated.
            ages: tokens, ascending, of gates that judge a key for several: `prediction` is then `[…, ages]`, and falls
                with age.

        Returns:
            int64, a figure a key; one figure for all keys where the layer is not gated.
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
        """How long keys stay visible, in tokens: `max(TTL, window)`, and a sink for good.

        Args:
            rule: of the layer.
            ttl: int64, of each key, or one figure for all.
            position: int64, each key's place among the real tokens of its row; broadcasts with `ttl`.

        Returns:
            int64, at most `FOREVER`.
        """
        longest = torch.as_tensor(ttl, device=position.device).clamp(min=rule.window or FOREVER)
        return torch.where(position < self.sinks, FOREVER, longest)


def _known(cls: type, content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise SmartKVError(f"{what} is a mapping, got {content!r}")
    names = {field.name for field in fields(cls)}
    if unknown := sorted(set(map(str, content)) - names):
        raise SmartKVError(f"{what} has no {', '.join(unknown)}: expected {', '.join(sorted(names))}")
    return content
