"""The old path of `smartkv.sparsity.keep_ratio`, which configs of version 0.1 name."""

from smartkv.sparsity.keep_ratio import Adaptive, Fixed, Linear, Schedule

__all__ = ["Adaptive", "Fixed", "Linear", "Schedule"]
