"""Old path of `smartkv.sparsity.keep_ratio`, kept because configs of version 0.1 name it."""

from smartkv.sparsity.keep_ratio import Adaptive, Fixed, Linear, Schedule

__all__ = ["Adaptive", "Fixed", "Linear", "Schedule"]
