"""Gates that judge by age, for the tests of dropping."""

from transformers import PreTrainedModel

from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.smartkv.cache.fixtures import random_gates


def gates_for_ages(model: PreTrainedModel, price: float = 0.0) -> GateBank:
    plain = random_gates(model)
    bank = GateBank(plain.fingerprint, Architecture.of(model.config).gated_layers, 16, 2, {"ages": [4, 9]})
    policy = HybridPolicy((LayerRule("all", "gated", 4),), sinks=2)
    bank.details |= {"policy": policy.to_dict(), "prices": [[0.1, price], [0.9, price]]}
    return bank
