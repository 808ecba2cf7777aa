"""SmartKV: a KV cache that frees memory and learns what to keep."""

from importlib.metadata import PackageNotFoundError, version

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
from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from smartkv.shards.manifest import Manifest

try:
    __version__ = version("smartkv")  # of pyproject.toml, as it was when the package was installed
except PackageNotFoundError:  # imported from a checkout that was not installed
    __version__ = "0+unknown"

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
