"""The old path of `smartkv.policies.budgets`."""

from smartkv.policies.budgets import Calibration, policy_of, price_curve, solve

__all__ = ["Calibration", "policy_of", "price_curve", "solve"]
