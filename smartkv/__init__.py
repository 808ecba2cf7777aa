"""SmartKV: a KV cache that frees memory and learns what to keep."""

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.policies.budgets import policy_of
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.shards.manifest import Manifest

__all__ = [
    "Architecture",
    "Backbone",
    "Fingerprint",
    "GateBank",
    "HybridPolicy",
    "LabelSpec",
    "LayerRule",
    "LifespanCache",
    "Manifest",
    "SmartKVError",
    "label_window",
    "load_backbone",
    "load_cache",
    "policy_of",
    "pretrained_gates",
    "save_cache",
]
