"""Gates (one MLP per KV head), their training objectives and their files; no policies and no caches."""

from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates

__all__ = ["GateBank", "pretrained_gates"]
