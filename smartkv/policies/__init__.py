"""Policies: which keys stay and for how long, as times to live, caps and prices. Frees nothing itself."""

from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy

__all__ = ["Calibration", "HybridPolicy", "LayerRule", "policy_of", "read_policy", "solve"]
