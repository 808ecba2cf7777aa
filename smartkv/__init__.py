"""SmartKV: a KV cache that frees memory and learns what to keep."""

from smartkv.backbones import Architecture, Backbone, Fingerprint, load_backbone
from smartkv.budgets import policy_of
from smartkv.cache import LifespanCache
from smartkv.cache_files import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gate_files import pretrained_gates
from smartkv.gates import GateBank
from smartkv.lifespans import LabelSpec, label_window
from smartkv.policies import HybridPolicy, LayerRule
from smartkv.shards import Manifest

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
