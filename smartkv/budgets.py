"""Old path of `smartkv.policies.budgets`, kept for code written for version 0.1."""

from smartkv.policies.budgets import Calibration, policy_of, price_curve, solve

__all__ = ["Calibration", "policy_of", "price_curve", "solve"]
