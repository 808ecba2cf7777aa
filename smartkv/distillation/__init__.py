"""Distillation: soft eviction and the loss through which gates learn from the model; no Trainer."""

from smartkv.distillation.kl_divergence import divergence
from smartkv.distillation.soft_keep import footprint, keep_share

__all__ = ["divergence", "footprint", "keep_share"]
