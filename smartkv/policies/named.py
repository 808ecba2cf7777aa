"""Named policies, and policies in YAML files."""

import math
from dataclasses import replace
from pathlib import Path

import yaml

from smartkv.errors import SmartKVError
from smartkv.io.checks import describe
from smartkv.models.layer_ranges import depth_ranges, format_layers
from smartkv.policies.hybrid import HybridPolicy, LayerRule

NAMED = ("default", "all-gated", "lifespan", "window", "full")
LIFESPAN_WINDOW = EARLY_WINDOW = 32  # tokens


def read_policy(name_or_file: str | Path, layers: int) -> HybridPolicy:
    """Return a policy by its name, or read one from a YAML file.

    Args:
        name_or_file: `default`, `all-gated`, `lifespan`, `window` or `full` (see `named_policy`); or the path of a file
            like those in configs/policies.
        layers: number of layers of the model, with which the policy `default` scales.

    Raises:
        SmartKVError: an argument of a wrong type, or neither a name nor a file that holds a policy.
    """
    if type(layers) is not int or layers < 1:
        raise SmartKVError(
            f"layers must be the model's number of layers, got {describe(layers)}: write model.config.num_hidden_layers"
        )
    if not isinstance(name_or_file, str | Path) or not str(name_or_file):
        raise SmartKVError(f"expected one of {', '.join(NAMED)} or a YAML file, got {describe(name_or_file)}")
    if name_or_file in NAMED:
        return named_policy(str(name_or_file), layers)
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        raise SmartKVError(f"policy '{name_or_file}' is neither one of {', '.join(NAMED)} nor a YAML file")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SmartKVError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SmartKVError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
    if isinstance(content, dict):
        content = {"name": path.stem} | content
    return HybridPolicy.from_dict(content)


def named_policy(name: str, layers: int) -> HybridPolicy:
    """Return a policy by its name, with the figures that a target footprint decides left open.

    * `default`: short windows in the first layers, gates in the middle, recent keys in the last layers; the policy of
      configs/policies/hybrid.yaml.
    * `all-gated`: gates in all layers.
    * `lifespan`: gates in all layers, and each key has its own TTL of `c · 4^y` tokens.
    * `window`: sinks and the most recent keys. It needs no gates.
    * `full`: all keys. It needs no gates.

    Args:
        name: one of the above.
        layers: number of layers of the model.

    Raises:
        SmartKVError: an unknown name.
    """
    if name == "lifespan":
        rules = [LayerRule("all", "gated", LIFESPAN_WINDOW)]
        return HybridPolicy(tuple(rules), price=-math.inf, multiple=None, name=name)
    if name == "all-gated":
        rules = [LayerRule("all", "gated")]
    elif name == "default":
        parts = depth_ranges(layers)
        by_depth = [
            LayerRule("early", "window", EARLY_WINDOW),
            LayerRule("middle", "gated"),
            LayerRule("late", "window"),
        ]
        rules = [
            replace(rule, layers=format_layers(list(parts[rule.layers]))) for rule in by_depth if parts[rule.layers]
        ]
    elif name in NAMED:  # window or full
        rules = [LayerRule("all", "full" if name == "full" else "window")]
    else:
        raise SmartKVError(f"policy '{name}' is unknown: expected one of {', '.join(NAMED)}")
    return HybridPolicy(tuple(rules), name=name)
