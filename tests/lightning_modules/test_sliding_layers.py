"""Gates for a model whose layers differ, from harvest to cache: some slide, or have linear attention."""

from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file

from datamodules.token_windows import TokenWindows
from lightning_modules.distillation import DistilledGates
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.models.backbone import load_backbone
from smartkv.policies.budgets import policy_of
from smartkv.shards.manifest import Manifest
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts
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
        with LifespanCache(model, gates, policy_of(gates, footprint), first_query=16) as cache, torch.inference_mode():
            model(tokens, past_key_values=cache)
        assert abs(cache.footprint - footprint) < 0.1


def test_distillation_trains_the_layers_that_see_everything_and_counts_the_others_as_they_are(tmp_path: Path) -> None:
    backbone = save_family(tmp_path / "backbone", "gemma3_text, sliding")
    model = load_backbone(str(backbone), "float32").model
    torch.manual_seed(3)
    start = GateBank(Fingerprint.of(model), [1])
    start.save_pretrained(tmp_path / "start")
    sources = [SourceConfig("mine", path=str(write_texts(tmp_path / "texts")))]
    data = TokenWindows(sources, WindowCounts(12, 2), str(backbone), 64, windows_per_document=20)
    module = DistilledGates(str(tmp_path / "start"), str(backbone), "float32", ages=(8, 24), threads=1)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                        default_root_dir=str(tmp_path))  # fmt: skip
    trainer.fit(module, datamodule=data)
    gates = module.gates().requires_grad_(False)
    assert gates.layers == [1] and not torch.equal(gates.bias2, start.bias2)
    gates.details |= module.details()
    tokens = data.plan.of_split("train")[: module.hparams.calibration_windows].long()
    reached = [footprint for footprint, _ in gates.details["prices"]]
    assert len(reached) > 1
    for footprint in reached:
        with LifespanCache(model, gates, policy_of(gates, footprint), first_query=16) as cache, torch.inference_mode():
            model(tokens, past_key_values=cache)
        assert abs(cache.footprint - footprint) < 0.05
    places = torch.arange(16, 64)
    _, kept = module.losses(tokens[0], policy_of(gates, 0.6).price, places, temperature=None)
    with LifespanCache(model, gates, policy_of(gates, 0.6), first_query=16) as cache, torch.inference_mode():
        model(tokens[:1], past_key_values=cache)
    torch.testing.assert_close(float(kept), cache.footprint, atol=0.02, rtol=0)


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
        with LifespanCache(model, gates, policy_of(gates, footprint), first_query=16) as cache, torch.inference_mode():
            model(tokens, past_key_values=cache)
        assert abs(cache.footprint - footprint) < 0.1
