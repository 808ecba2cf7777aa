"""Gates distilled through a tiny LM: what is trained, what is exported, and how it may be stopped and divided."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from datamodules.token_windows import TokenWindows, WindowBatch
from lightning_modules.distillation import DistilledGates
from smartkv import GateBank, HybridPolicy, LifespanCache, load_backbone, policy_of
from smartkv.distillation.soft_keep import footprint
from smartkv.errors import SmartKVError
from smartkv.models.key_hooks import read_keys
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts as Counts
from tests.lightning_fixtures import error_line, prose, refused, run_cli, run_command, write_config
from tests.models import save_random_gates

TOKENS = 96


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        (folder / split / f"{split}.txt").write_text(prose(4000, seed=len(split)))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return save_random_gates(tiny_backbone, tmp_path_factory.mktemp("gates"), seed=3)


def config(out: Path, backbone: Path, texts: Path, start: Path, **changes: Any) -> dict[str, Any]:
    model = {"gates": str(start), "backbone": str(backbone), "dtype": "float32", "ages": [8, 24], "threads": 1}
    data = {"sources": [{"name": "mine", "path": str(texts)}], "windows": {"train": 12, "validation": 2},
            "backbone": str(backbone), "window": TOKENS, "windows_per_document": 20, "batch_size": 2}  # fmt: skip
    callbacks = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {
                "dirpath": str(out / "checkpoints"),
                "filename": "{step}",
                "every_n_train_steps": 4,
                "save_top_k": -1,
                "save_last": True,
            },
        },
        {"class_path": "GateExport", "init_args": {"out": str(out / "export"), "monitor": "val_loss", "mode": "min"}},
    ]
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_progress_bar": False,
               "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": str(out),
               "callbacks": callbacks, "log_every_n_steps": 1}  # fmt: skip
    return {
        "trainer": trainer | changes.get("trainer", {}),
        "model": {"class_path": "DistilledGates", "init_args": model | changes.get("model", {})},
        "data": {"class_path": "TokenWindows", "init_args": data | changes.get("data", {})},
    }


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path, start: Path) -> Path:
    """Two epochs of six steps."""
    out = tmp_path_factory.mktemp("distilled")
    run_cli("fit", "-c", write_config(out / "run.yaml", config(out, tiny_backbone, texts, start)))
    return out


def test_the_exported_gates_serve_a_cache_with_the_policy_that_goes_with_them(
    distilled: Path, tiny_backbone: Path
) -> None:
    model = load_backbone(str(tiny_backbone), "float32").model
    gates = GateBank.from_pretrained(distilled / "export", model)
    policy = HybridPolicy.from_dict(gates.details["policy"])
    assert gates.details["target"] == "log worth" and gates.ages == (8, 24) and policy.open == "price"
    cache = LifespanCache(model, gates, policy_of(gates, 0.5))
    model(torch.arange(TOKENS)[None] % 50, past_key_values=cache)
    assert 0.2 < cache.footprint < 0.8


def test_training_lowers_what_it_minimises(distilled: Path, tiny_backbone: Path, texts: Path, start: Path) -> None:
    """Σ over fixed prices of divergence + price · footprint, on the training windows, from the start to the end."""
    module, data = module_of(tiny_backbone, texts, start)

    def objective() -> float:
        total = 0.0
        for ids in data.plan.of_split("train").long():
            for price in (0.15, 0.5, 1.2):
                lost, kept = module.losses(ids, math.log(price), torch.arange(24, TOKENS), temperature=0.5)
                total += float(lost + price * kept)
        return total

    with torch.no_grad():
        before = objective()
        state = torch.load(distilled / "checkpoints" / "step=12.ckpt", weights_only=True)["state_dict"]
        module.load_state_dict(state)
        assert objective() < 0.97 * before


def test_at_the_start_the_prices_span_a_twentieth_to_a_third_of_what_is_beyond_the_window(
    tiny_backbone: Path, texts: Path, start: Path
) -> None:
    module, data = module_of(tiny_backbone, texts, start, calibration_windows=12, ages=(2,), sinks=1)
    with torch.no_grad():
        kept = {
            price: torch.stack(
                [
                    module.losses(ids, math.log(price), torch.arange(24, TOKENS), temperature=None)[1]
                    for ids in data.plan.of_split("train").long()
                ]
            ).mean()
            for price in (module.hparams.price_low, module.hparams.price_high)
        }
    in_full = float(footprint(torch.zeros(1, TOKENS, 1), [2], 1, 24))
    beyond = [(float(share) - in_full) / (1 - in_full) for share in kept.values()]
    assert beyond == pytest.approx([0.35, 0.05], abs=0.06)


@pytest.mark.parametrize("shift", [0.0, 0.7], ids=["as they are", "with another price in all they say"])
def test_a_validation_compares_gates_at_equal_footprints_whatever_they_keep_at_a_price(
    shift: float, tiny_backbone: Path, texts: Path, start: Path
) -> None:
    """Gates that hold every key dearer by a factor keep more at each price, and evict in the same order."""
    module, data = module_of(tiny_backbone, texts, start, ages=(2,), sinks=1)
    ids, logged = data.plan.of_split("validation").long()[:1], {}
    module.log_dict = lambda figures, **_: logged.update(figures)
    module.log = lambda name, value, **_: logged.update({name: value})
    with torch.no_grad():
        module.bank.bank.bias2 += shift
        module.validation_step(WindowBatch(ids, torch.zeros(1), 1), 0)
        in_full = float(footprint(torch.zeros(1, TOKENS, 1), [2], 1, 24))
        want = 0.0
        for name, share in {"large": 0.2, "middle": 0.1, "small": 0.04}.items():
            assert float(logged[f"val_footprint/{name}"]) == pytest.approx(in_full + share * (1 - in_full), abs=0.04)
            want += float(logged[f"val_divergence/{name}"] * logged[f"val_footprint/{name}"]) / 3
        assert logged["val_loss"] == pytest.approx(want)
        module.bank.bank.bias2 -= shift
        module.validation_step(WindowBatch(ids, torch.zeros(1), 1), 0)
        assert logged["val_loss"] == pytest.approx(want, rel=0.02)


def module_of(backbone: Path, texts: Path, start: Path, **settings: Any) -> tuple[DistilledGates, TokenWindows]:
    """A module with its model and data, as `fit` sets them up."""
    data = TokenWindows(
        [SourceConfig("mine", path=str(texts))], Counts(12, 2), str(backbone), TOKENS, windows_per_document=20
    )
    settings = {"ages": (8, 24), "threads": 1, "dtype": "float32"} | settings
    module = DistilledGates(str(start), str(backbone), **settings)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=str(texts))
    trainer.datamodule = data
    module.trainer, data.trainer = trainer, trainer
    data.setup("fit")
    module.setup("fit")
    module.configure_model()
    return module, data


def test_training_goes_on_from_gates_that_were_distilled_for_the_same_ages(
    distilled: Path, tiny_backbone: Path, texts: Path
) -> None:
    module, _ = module_of(tiny_backbone, texts, distilled / "export")
    want = GateBank.from_pretrained(distilled / "export")
    torch.testing.assert_close(module.gates().state_dict(), want.state_dict(), atol=1e-5, rtol=1e-5)
    with pytest.raises(SmartKVError, match=r"judge for ages \[8, 24\], not for \[8, 16\]"):
        module_of(tiny_backbone, texts, distilled / "export", ages=(8, 16))


def test_gates_are_trained_on_keys_of_mean_0_and_deviation_1(tiny_backbone: Path, texts: Path, start: Path) -> None:
    module, data = module_of(tiny_backbone, texts, start, calibration_windows=1)
    keys = read_keys(module.lm.model, data.plan.of_split("train").long()[0])
    read = {}
    module.bank.bank.predict = lambda layer, rows: read.update({layer: rows})
    for layer, raw in enumerate(keys):
        module.bank.predict(layer, raw)
        rows = read[layer][0]
        torch.testing.assert_close(rows.mean(dim=1), torch.zeros_like(rows[:, 0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(rows.std(dim=1, correction=0), torch.ones_like(rows[:, 0]), atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_trained_on_raw_keys_goes_on_as_it_was(
    tmp_path: Path, distilled: Path, tiny_backbone: Path, texts: Path, start: Path
) -> None:
    old = torch.load(distilled / "checkpoints/step=12.ckpt", weights_only=True)
    raw = GateBank.from_pretrained(distilled / "export")
    raw.load_state_dict({name: old["state_dict"][f"bank.bank.{name}"] for name in raw.state_dict()})
    old["state_dict"] = {f"bank.{name}": tensor for name, tensor in raw.state_dict().items()}
    torch.save(old, tmp_path / "old.ckpt")
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts, start)),
            "--ckpt_path", str(tmp_path / "old.ckpt"))  # fmt: skip
    new = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert new["bank.key_mean"].abs().max() == 0 and (new["bank.key_std"] == 1).all()
    for name, tensor in raw.state_dict().items():
        torch.testing.assert_close(new[f"bank.bank.{name}"], tensor, atol=0, rtol=0)


def test_the_temperature_falls_geometrically_over_the_run(tiny_backbone: Path, texts: Path, start: Path) -> None:
    module, _ = module_of(tiny_backbone, texts, start, temperature=0.8, temperature_end=0.2)
    module.trainer.fit_loop.max_epochs, steps = 1, 12
    falling = []
    for step in range(steps):
        module.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        falling.append(module.temperature())
    assert falling[0] == pytest.approx(0.8) and falling[-1] == pytest.approx(0.2)
    assert all(b / a == pytest.approx((0.2 / 0.8) ** (1 / (steps - 1))) for a, b in itertools.pairwise(falling))


def test_two_processes_train_what_one_does(
    tmp_path: Path, distilled: Path, tiny_backbone: Path, texts: Path, start: Path
) -> None:
    both = config(tmp_path, tiny_backbone, texts, start, trainer={"devices": 2, "strategy": "ddp"})
    run_command("fit", "-c", write_config(tmp_path / "run.yaml", both))
    one, two = (load_file(folder / "export" / "model.safetensors") for folder in (distilled, tmp_path))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("step", [4, 8, 12], ids=["first epoch", "second epoch", "before the last validation"])
def test_a_resumed_run_ends_with_the_weights_and_the_export_of_the_uninterrupted_one(
    step: int, tmp_path: Path, distilled: Path, tiny_backbone: Path, texts: Path, start: Path
) -> None:
    path = write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts, start))
    run_cli("fit", "-c", path, "--ckpt_path", str(distilled / "checkpoints" / f"step={step}.ckpt"))
    whole, resumed = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (distilled, tmp_path)
    )
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], atol=1e-6, rtol=0)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (distilled / "export" / name).read_bytes()


@pytest.mark.parametrize("by", ["file", "last"])
def test_another_price_than_the_checkpoints_is_refused_with_both(
    by: str,
    tmp_path: Path,
    distilled: Path,
    tiny_backbone: Path,
    texts: Path,
    start: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = config(distilled, tiny_backbone, texts, start, model={"price_high": 3.0, "learning_rate": 0.1})
    given = distilled / "checkpoints/step=4.ckpt" if by == "file" else "last"
    told = error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "run.yaml", other), "--ckpt_path", given))
    assert "another run: price_high 1.6, now 3.0; learning_rate 0.002, now 0.1. Give" in told


def test_a_checkpoint_has_the_dtype_that_auto_chose(distilled: Path, tmp_path: Path) -> None:
    settings = torch.load(distilled / "checkpoints/last.ckpt", weights_only=True)["settings"]
    assert settings["dtype"] == "float32" and settings["price_low"] == 0.1 and "threads" not in settings


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model": {"price_low": 2.0}}, "price_high must be above price_low, got 2.0 to 1.6"),
        ({"model": {"temperature_end": 0}}, "temperature_end must be above 0, got 0"),
        ({"model": {"ages": [16, 8]}}, "ages must be numbers of tokens, ascending, the first at least 1, got [16, 8]"),
        ({"model": {"ages": []}}, "ages must be numbers of tokens"),
        ({"model": {"hidden": 65}}, "hidden units of the gates, got 65"),
        ({"model": {"score_from": 95}}, "score_from must lie between sinks and the window of 96"),
        ({"model": {"backbone": "elsewhere"}}, "they must be the same"),
        ({"data": {"windows": {"train": 2, "validation": 0}}}, "train and validation must be at least 1 each"),
        ({"data": {"batch_size": 0}}, "batch_size must be at least 1 window"),
        ({"data": {"window": 4096}}, "window 4096 is longer than the 512 positions"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    wrong: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: Path,
    start: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts, start, **wrong))
    assert said in error_line(refused(capsys, "fit", "-c", path, status=None))


def test_the_config_says_what_the_gates_were_distilled_on(distilled: Path) -> None:
    details = json.loads((distilled / "export" / "config.json").read_text())["details"]
    assert details["training"]["window"] == TOKENS and details["training"]["settings"]["price_high"] == 1.6
    assert details["metrics"]["val_loss"] > 0
    assert [footprint for footprint, _ in details["layer_shares"]] == [footprint for footprint, _ in details["prices"]]
    assert all(len(shares) == 2 for _, shares in details["layer_shares"])  # a share for each layer


@pytest.mark.gpu
def test_on_the_gpu_the_same_gates_come_out(
    distilled: Path, tmp_path: Path, tiny_backbone: Path, texts: Path, start: Path
) -> None:
    asked = config(tmp_path, tiny_backbone, texts, start, trainer={"accelerator": "gpu"})
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", asked))
    mine, theirs = (load_file(next((out / "export").glob("*.safetensors"))) for out in (tmp_path, distilled))
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name].float(), weight.float(), atol=0.02, rtol=0.05)
