"""The old path of `smartkv.sparsity.dropping`, which configs of version 0.1 name."""

from smartkv.sparsity.dropping import Dropping, GateDropping, NoDropping, RandomDropping, WindowDropping

__all__ = ["Dropping", "GateDropping", "NoDropping", "RandomDropping", "WindowDropping"]
