"""LoRA while keys are dropped: what is trained, what stands still, and how it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from peft import PeftModel
from transformers import modeling_utils

from datamodules.token_windows import TokenWindows
from lightning_modules.eviction_tuning import EvictionTuning
from smartkv import GateBank, HybridPolicy, LayerRule, LifespanCache, load_backbone
from smartkv.errors import SmartKVError
from smartkv.sparsity import Linear
from smartkv.sparsity.dropping import RandomDropping
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts
from tests.lightning_fixtures import error_line, refused, run_cli, run_command, write_config
from tests.models import token_ids
from tests.tuning_fixtures import TOKENS, config, weights, write_long_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """Gates for two ages, with a price."""
    torch.manual_seed(0)
    policy = HybridPolicy((LayerRule("all", "gated", 8),), sinks=2)
    details = {"ages": [8, 24], "policy": policy.to_dict(), "prices": [[0.1, 0.0], [0.9, 0.0]]}
    folder = tmp_path_factory.mktemp("gates")
    GateBank(load_backbone(str(tiny_backbone)).fingerprint, None, 16, 2, details).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path) -> Path:
    """Two epochs of four steps."""
    out = tmp_path_factory.mktemp("tuned")
    run_cli("fit", "-c", write_config(out / "run.yaml", config(out, tiny_backbone, texts)))
    return out


def test_checkpoints_hold_adapters_and_nothing_of_the_base(tuned: Path) -> None:
    checkpoint = torch.load(tuned / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"] and all("lora_" in name for name in checkpoint["state_dict"])


def test_a_run_that_stopped_goes_on_to_the_same_adapters(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path
) -> None:
    out = config(tmp_path, tiny_backbone, texts)
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", out), "--ckpt_path", tuned / "checkpoints/step=4.ckpt")
    for name, weight in weights(tuned).items():
        assert torch.allclose(weights(tmp_path)[name], weight, atol=1e-6), name


def test_batches_that_are_accumulated_are_one_large_batch(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path
) -> None:
    halves = {"trainer": {"accumulate_grad_batches": 2}, "data": {"batch_size": 1}}
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts, **halves)))
    for name, weight in weights(tuned).items():
        assert torch.allclose(weights(tmp_path)[name], weight, atol=1e-4), name


def test_a_validation_is_at_the_ratio_that_the_checkpoint_had_reached(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios, inner = [], EvictionTuning.keep_ratio

    def noted(self: EvictionTuning) -> float:
        ratios.append(inner(self))
        return ratios[-1]

    monkeypatch.setattr(EvictionTuning, "keep_ratio", noted)
    run = write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts))
    run_cli("validate", "-c", run, "--ckpt_path", tuned / "checkpoints/last.ckpt")
    assert ratios and ratios == pytest.approx([0.3] * len(ratios))


def test_two_processes_train_what_one_does(tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path) -> None:
    trainer, data = {"devices": 2, "strategy": "ddp"}, {"windows": {"train": 8, "validation": 3}}
    both = config(tmp_path, tiny_backbone, texts, trainer=trainer, data=data)  # of three one process validates one
    run_command("fit", "-c", write_config(tmp_path / "run.yaml", both))
    for name, weight in weights(tuned).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("limit", "stopped"), [({}, 2), ({"max_steps": 6}, 6)], ids=["on the way", "before the last"])
def test_an_adaptive_run_that_stopped_before_a_validation_goes_on_as_if_it_had_not(
    limit: dict[str, int], stopped: int, tmp_path: Path, tiny_backbone: Path, texts: Path
) -> None:
    schedule = {"class_path": "smartkv.sparsity.Adaptive", "init_args": {"change": 0.2, "tolerance": 1.0}}  # NLL is 5
    changes = {"model": {"schedule": schedule}, "trainer": {"val_check_interval": 2} | limit}
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_cli("fit", "-c", write_config(whole / "run.yaml", config(whole, tiny_backbone, texts, **changes)))
    resumed = write_config(again / "run.yaml", config(again, tiny_backbone, texts, **changes))
    run_cli("fit", "-c", resumed, "--ckpt_path", whole / f"checkpoints/step={stopped}.ckpt")
    ratios = [json.loads((out / "final" / "schedule.json").read_text())["keep_ratio"] for out in (whole, again)]
    assert ratios[0] == ratios[1] == pytest.approx(0.3)
    for name, weight in weights(whole).items():
        assert torch.allclose(weights(again)[name], weight, atol=1e-6), name


def test_a_checkpoint_of_another_run_is_refused(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dropping = {"class_path": "smartkv.sparsity.dropping.WindowDropping", "init_args": {"window": 12}}
    nearer = {"class_path": "smartkv.sparsity.dropping.RandomDropping", "init_args": {"recent": 9}}
    other = {"dropping": nearer, "schedule": {"class_path": "smartkv.sparsity.Adaptive"}, "ce_weight": 0.5}
    said = "dropping.recent 8, now 9; schedule Linear, now Adaptive; ce_weight 1.0, now 0.5. Give"
    checkpoint = tuned / "checkpoints/step=4.ckpt"
    changes = [
        ({"dropping": dropping}, checkpoint, "dropping RandomDropping, now WindowDropping"),
        (other, "last", said),
    ]
    for change, given, expected in changes:
        run = write_config(tmp_path / "run.yaml", config(tuned, tiny_backbone, texts, model=change))
        told = error_line(refused(capsys, "fit", "-c", run, "--ckpt_path", given))
        assert f"is of another run: {expected}" in told


def test_another_seed_is_another_run_on_the_same_texts(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path
) -> None:
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts, model={"seed": 1})))
    assert not any(torch.allclose(weights(tmp_path)[name], weight) for name, weight in weights(tuned).items())
    digests = {json.loads((out / "final" / "training.json").read_text())["data"]["tokens"] for out in (tuned, tmp_path)}
    assert len(digests) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_fails_leaves_the_model_as_it_was(
    where: str, tmp_path: Path, tiny_backbone: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    def fail(self: EvictionTuning, *_: Any) -> Any:
        models.append(self.lm.model)
        raise ZeroDivisionError

    inner = EvictionTuning.hidden

    def hidden(self: EvictionTuning, ids: torch.Tensor) -> torch.Tensor:
        return inner(self, ids) if not torch.is_grad_enabled() else fail(self)

    name = {"forward": "hidden", "backward": "backward"}[where]
    monkeypatch.setattr(EvictionTuning, name, hidden if where == "forward" else fail)
    with pytest.raises(ZeroDivisionError):
        run_cli("fit", "-c", write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts)))
    assert models and all(model.config._attn_implementation == "sdpa" for model in models)


def test_gradient_checkpointing_sees_the_same_mask(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, inner = [], modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    changed = config(tmp_path, tiny_backbone, texts, model={"gradient_checkpointing": True})
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", changed))
    for name, weight in weights(tuned).items():
        assert torch.allclose(weights(tmp_path)[name], weight, atol=1e-4), name
    assert len(calls) >= 8 * 2  # steps, layers


@pytest.mark.parametrize("kind", ["NoDropping", "WindowDropping", "GateDropping", "soft"])
def test_every_way_of_dropping_trains(kind: str, tmp_path: Path, tiny_backbone: Path, texts: Path, gates: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "NoDropping": {},
        "WindowDropping": {"window": 12},
        "GateDropping": {"gates": str(gates), "footprint": 0.5},
        "soft": {"gates": str(gates), "footprint": 0.5, "temperature": 0.3, "train": True},
    }
    name = "GateDropping" if kind == "soft" else kind
    dropping = {"class_path": f"smartkv.sparsity.mask_sources.{name}", "init_args": options[kind]}
    changes = {"model": {"dropping": dropping, "hidden_weight": 0.1}, "trainer": {"max_epochs": 1}}
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts, **changes)))
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path).values())
    assert any(weight.abs().max() > 0 for name, weight in weights(tmp_path).items() if "lora_B" in name)
    if kind == "soft":
        before, after = GateBank.from_pretrained(gates), GateBank.from_pretrained(tmp_path / "final" / "gates")
        assert not torch.equal(before.weight2, after.weight2) and before.details["prices"] != after.details["prices"]


def test_a_tuned_model_works_on_an_evicting_cache(tuned: Path, tiny_backbone: Path) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    student = PeftModel.from_pretrained(lm.model, tuned / "final")
    policy = HybridPolicy((LayerRule("all", "window", 8),), sinks=2)
    with torch.inference_mode(), LifespanCache(lm.model, None, policy) as cache:
        found = lm.model.generate(token_ids(30)[None], past_key_values=cache, max_new_tokens=5, min_new_tokens=5)
    assert found.shape == (1, 35) and cache.footprint < 0.8 and student is not None


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"rank": 0}, "rank must be above 0"),
        ({"ce_weight": 0, "kl_weight": 0}, "not all 0"),
        ({"targets": ["nope"]}, "are no modules of"),
        ({"targets": ["q_proj", "lm_head"]}, "the output embedding among them"),
        ({"dtype": "float16"}, "float16 has too little range"),
    ],
)
def test_mistakes_are_told(
    model: dict[str, Any],
    says: str,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = config(tmp_path, tiny_backbone, texts, model=model)
    assert says in refused(capsys, "fit", "-c", write_config(tmp_path / "run.yaml", changed))


def test_a_sharded_strategy_is_refused(
    tmp_path: Path, tiny_backbone: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = EvictionTuning(RandomDropping(), Linear(), str(tiny_backbone), "float32", rank=4)
    module._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(SmartKVError, match="give strategy ddp"):
        module.configure_model()


def test_a_curriculum_without_an_end_is_refused(
    tmp_path: Path, tiny_backbone: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = config(tmp_path, tiny_backbone, texts, trainer={"max_epochs": -1})
    assert "needs an end" in refused(capsys, "fit", "-c", write_config(tmp_path / "run.yaml", endless))


def test_processes_without_windows_are_refused(tiny_backbone: Path, texts: Path) -> None:
    sources, counts = [SourceConfig("mine", path=str(texts))], WindowCounts(4, 2, 0)
    data = TokenWindows(sources, counts, str(tiny_backbone), TOKENS, batch_size=1)
    data.trainer = SimpleNamespace(world_size=2, is_global_zero=True)
    with pytest.raises(SmartKVError, match="at least 1 window a process, of which there are 2, got 1"):
        data.setup("fit")


@pytest.mark.gpu
def test_on_the_gpu_the_same_adapters_come_out(tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path) -> None:
    asked = config(tmp_path, tiny_backbone, texts, trainer={"accelerator": "gpu"})
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", asked))
    pairs = zip(weights(tmp_path).values(), weights(tuned).values(), strict=True)
    assert all(float((mine - theirs).norm() / theirs.norm()) < 0.1 for mine, theirs in pairs)
