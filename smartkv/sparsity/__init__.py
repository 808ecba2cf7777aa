"""Eviction while a model is trained: which tokens always stay, which keys go, and how many of them when."""

from smartkv.sparsity.anchors import Anchors
from smartkv.sparsity.masking import sparse_mask, sparsely_attended
from smartkv.sparsity.schedule import Adaptive, Fixed, Linear, Schedule

__all__ = ["Adaptive", "Anchors", "Fixed", "Linear", "Schedule", "sparse_mask", "sparsely_attended"]
