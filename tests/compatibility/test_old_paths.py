"""Import paths of version 0.1 that users have in their code and configs."""

import importlib

import pytest

OLD = {
    "smartkv": ["GateBank", "HybridPolicy", "LayerRule", "LifespanCache", "load_backbone", "policy_of", "save_cache"],
    "smartkv.budgets": ["Calibration", "policy_of", "price_curve", "solve"],
    "smartkv.cache": ["LifespanCache"],
    "smartkv.distillation": ["divergence", "footprint", "keep_share"],
    "smartkv.gates": ["GateBank"],
    "smartkv.objectives": ["FutureAttention", "Log4Lifespan", "OrdinalAges", "Ranking"],
    "smartkv.policies": ["HybridPolicy", "LayerRule"],
    "smartkv.quantization": ["dequantize", "quantize"],
    "smartkv.shards": ["Manifest", "ShardReader"],
    "smartkv.sparsity": ["Adaptive", "Anchors", "Fixed", "Linear", "sparse_mask"],
    "smartkv.sparsity.mask_sources": ["GateDropping", "NoDropping", "RandomDropping", "WindowDropping"],
    "smartkv.sparsity.schedule": ["Adaptive", "Fixed", "Linear"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in OLD.items() for name in names])
def test_a_name_is_found_where_it_was(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name).__module__.startswith("smartkv.")
