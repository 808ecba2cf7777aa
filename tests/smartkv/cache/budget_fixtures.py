"""Gates that judge for ages, and a policy whose price is open, for tests of budgets."""

from typing import Any

import torch
from transformers import PreTrainedModel

from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.smartkv.policies.naive_floating_price import AGES

WINDOW, SINKS = 5, 2
POLICY = HybridPolicy((LayerRule("all", "gated", WINDOW),), sinks=SINKS)


def aged_gates(model: PreTrainedModel, **details: Any) -> GateBank:
    """Random gates that judge at the ages of the naive loop."""
    torch.manual_seed(1)
    fingerprint = Fingerprint.of(model)
    layers = Architecture.of(model.config).gated_layers
    return GateBank(fingerprint, layers, 16, len(AGES), {"ages": list(AGES), "target": "log worth"} | details)
