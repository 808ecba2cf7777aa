"""Eviction while a model is trained: anchors, dropping of keys, keep ratios and masked attention; no Trainer."""

from smartkv.sparsity.anchors import Anchors
from smartkv.sparsity.keep_ratio import Adaptive, Fixed, Linear, Schedule
from smartkv.sparsity.masked_attention import sparse_attention, sparse_mask

__all__ = ["Adaptive", "Anchors", "Fixed", "Linear", "Schedule", "sparse_attention", "sparse_mask"]
