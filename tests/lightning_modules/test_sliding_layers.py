"""Gates for a model whose layers differ, from harvest to cache: some slide, or have linear attention."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.models.backbone import load_backbone
from smartkv.shards.manifest import Manifest
from tests.families import save_family
from tests.lightning_fixtures import fit_by_trainer, harvest_by_trainer, write_texts


def test_only_layers_that_see_everything_get_gates_and_their_prices_are_of_that_model(tmp_path: Path) -> None:
    backbone = save_family(tmp_path / "backbone", "gemma3_text, sliding")
    shards = harvest_by_trainer(tmp_path / "shards", backbone, write_texts(tmp_path / "texts"))
    assert Manifest.read(shards).sliding_windows == (6, None)
    module = fit_by_trainer(shards, tmp_path / "fit").module
    gates: GateBank = module.gates()
    assert gates.layers == [1]
    gates.details = module.details()
    gates.details |= module.policy_with_prices(gates)
    assert [rule["rule"] for rule in gates.details["policy"]["rules"]] == ["gated", "full"]
    model = load_backbone(str(backbone), "float32").model
    tokens = load_file(shards / "train-00000.safetensors")["token"].long().view(-1, 64)
    assert gates.details["prices"]
    for footprint, _ in gates.details["prices"]:
        with LifespanCache(model, gates, footprint=footprint, first_query=16) as cache, torch.inference_mode():
            model(tokens, past_key_values=cache)
        assert abs(cache.footprint - footprint) < 0.1


def test_a_hybrid_model_gets_gates_in_its_layers_with_attention(tmp_path: Path) -> None:
    backbone = save_family(tmp_path / "backbone", "qwen3_next")
    shards = harvest_by_trainer(tmp_path / "shards", backbone, write_texts(tmp_path / "texts"))
    assert Manifest.read(shards).fingerprint.layers == 2  # of four
    module = fit_by_trainer(shards, tmp_path / "fit").module
    gates: GateBank = module.gates()
    assert gates.layers == [0, 1]
    model = load_backbone(str(backbone), "float32").model
    tokens = load_file(shards / "train-00000.safetensors")["token"].long().view(-1, 64)
    gates.details = module.details()
    gates.details |= module.policy_with_prices(gates)
    assert gates.details["prices"]
    for footprint, _ in gates.details["prices"]:
        with LifespanCache(model, gates, footprint=footprint, first_query=16) as cache, torch.inference_mode():
            model(tokens, past_key_values=cache)
        assert abs(cache.footprint - footprint) < 0.1
