"""Gates: one MLP per KV head, their objectives, their files. Knows no policy and no cache."""

from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates

__all__ = ["GateBank", "pretrained_gates"]
