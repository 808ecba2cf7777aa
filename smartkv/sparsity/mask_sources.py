"""Old path of `smartkv.sparsity.dropping`, kept because configs of version 0.1 name it."""

from smartkv.sparsity.dropping import Dropping, GateDropping, NoDropping, RandomDropping, WindowDropping

__all__ = ["Dropping", "GateDropping", "NoDropping", "RandomDropping", "WindowDropping"]
