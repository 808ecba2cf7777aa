"""SmartKV: a KV cache that frees memory and learns what to keep."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.moved import moved_line, tell_moved_modules
from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from smartkv.shards.manifest import Manifest


def _version() -> str:
    """Return the version in pyproject.toml: of this checkout, else as recorded when the package was installed.

    An editable install records the version once, so in a checkout the record may be older than the code.
    """
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file() and (table := tomllib.loads(project.read_text()).get("project", {})).get("name") == "smartkv":
        return table["version"]
    try:
        return version("smartkv")
    except PackageNotFoundError:
        return "0+unknown"


__version__ = _version()
tell_moved_modules()

if not TYPE_CHECKING:  # or type checkers would take any name for one of this module

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(moved_line(name) or f"module 'smartkv' has no attribute '{name}'")


__all__ = [
    "AdaptiveCache",
    "Architecture",
    "Backbone",
    "Calibration",
    "Fingerprint",
    "FootprintOutOfReach",
    "GateBank",
    "HybridPolicy",
    "LabelSpec",
    "LayerRule",
    "LifespanCache",
    "Manifest",
    "QuantizedCache",
    "SmartKVError",
    "__version__",
    "label_window",
    "load_backbone",
    "load_cache",
    "policy_of",
    "pretrained_gates",
    "read_policy",
    "save_cache",
    "solve",
]
