"""Settings of the Trainer and of the command line: they work, or they are refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules import DistilledGates, EvictionTuning
from lightning_modules.trainer_settings import best_checkpoint, lightning_refusals
from smartkv import GateBank
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import (
    Watcher,
    error_line,
    fit_by_trainer,
    gates_config,
    harvest_config_at,
    last_logged,
    refused,
    run_cli,
    write_config,
)
from tests.tuning_fixtures import config as tuning_config
from tests.tuning_fixtures import write_long_texts

MONITORED = {"monitor": "val_loss", "save_last": True, "enable_version_counter": False, "filename": "{step}"}
Capture = pytest.CaptureFixture[str]


def told(capsys: Capture, shards: Path, root: Path, trainer: dict[str, Any], *options: str, **settings: Any) -> str:
    """The one line of a fit of gates that is refused."""
    path = write_config(root / "fit.yaml", gates_config(shards, root / "run", trainer=trainer, **settings))
    return error_line(refused(capsys, "fit", "-c", path, *options))


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_gates_are_trained_in_a_precision_that_is_allowed(
    precision: str, tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path
) -> None:
    fit_by_trainer(tiny_shards, tmp_path, trainer={"precision": precision})
    mine, theirs = last_logged(tmp_path), last_logged(root)
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=0.02)  # initial float64 weights are others


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_another_precision_is_refused_with_what_to_do(
    precision: str, tiny_shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    line = told(capsys, tiny_shards, tmp_path, {"precision": precision})
    assert "trainer.precision must be 32-true or 64-true or bf16-mixed or 16-mixed here" in line
    assert f"got {precision}: " in line and "model.dtype" in line


def test_a_harvest_has_the_dtype_of_its_model_alone(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: Capture
) -> None:
    path = harvest_config_at(tmp_path / "out", tiny_backbone, tiny_texts, trainer={"precision": "bf16-mixed"})
    line = error_line(refused(capsys, "predict", "-c", path))
    assert "trainer.precision must be 32-true here, got bf16-mixed: the language model's dtype is model.dtype" in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_each_module_says_in_which_precisions_it_is_trained() -> None:
    assert "bf16-mixed" in EvictionTuning.PRECISIONS and "bf16-true" not in EvictionTuning.PRECISIONS
    assert "bf16-mixed" not in DistilledGates.PRECISIONS and "32-true" in DistilledGates.PRECISIONS


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_tuned_in_mixed_precision(tmp_path: Path, tiny_backbone: Path) -> None:
    texts = write_long_texts(tmp_path)
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        out = tmp_path / precision
        trainer = {"precision": precision, "max_epochs": 1, "logger": {"class_path": "CSVLogger", "init_args": {
            "save_dir": str(out), "name": "", "version": ""}}}  # fmt: skip
        run_cli("fit", "-c", write_config(out / "run.yaml", tuning_config(out, tiny_backbone, texts, trainer=trainer)))
        losses.append(last_logged(out)["val_nll"])
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


# -- batches and validations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs is 0, so nothing would be trained: give at least 1, or leave it out"),
        ({"max_steps": 0}, "trainer.max_steps is 0, so nothing would be trained"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches is 0, so nothing would be trained"),
        ({"limit_train_batches": 0.0}, "trainer.limit_train_batches is 0, so nothing would be trained"),
        ({"overfit_batches": 2}, "trainer.overfit_batches must be 0, got 2: batches are drawn by steps"),
        ({"limit_val_batches": 0}, "with limit_val_batches 0 there is no validation, but callbacks wait"),
        ({"check_val_every_n_epoch": 9}, "with check_val_every_n_epoch 9 in a run of 2 there is no validation"),
        ({"limit_train_batches": 0.01}, "Please increase the `limit_train_batches` argument"),
        ({"val_check_interval": 1000}, "must be less than or equal to the number of the training batches (10)"),
        ({"devices": 0}, "`Trainer(devices=0)` value is not a valid input"),
        ({"strategy": "nonsense"}, "You selected an invalid strategy name"),
        ({"barebones": True}, "was passed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_does_not_work_is_refused(
    trainer: dict[str, Any], said: str, tiny_shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), **MONITORED}}
    assert said in told(capsys, tiny_shards, tmp_path, trainer, callbacks=[saving])


@pytest.mark.parametrize("trainer", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 9}], ids=str)
def test_a_run_without_validations_exports_its_gates_at_its_end(
    trainer: dict[str, Any], tiny_shards: Path, tmp_path: Path
) -> None:
    export = {"class_path": "GateExport", "init_args": {"out": str(tmp_path / "export")}}
    dashboard = {"class_path": "HeadDashboard"}
    config = gates_config(tiny_shards, tmp_path / "run", trainer=trainer, callbacks=[export, dashboard])
    run_cli("fit", "-c", write_config(tmp_path / "fit.yaml", config))
    training = GateBank.from_pretrained(tmp_path / "export").details["training"]
    assert training["step"] == 20


def test_a_schedule_that_validations_decide_needs_them(tmp_path: Path, tiny_backbone: Path, capsys: Capture) -> None:
    schedule = {"schedule": {"class_path": "smartkv.sparsity.Adaptive"}}
    texts, trainer = write_long_texts(tmp_path), {"limit_val_batches": 0}
    config = tuning_config(tmp_path / "run", tiny_backbone, texts, model=schedule, trainer=trainer)
    line = error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config)))
    assert "Adaptive is decided by validations, which limit_val_batches 0 leaves out" in line


def test_an_error_of_a_library_below_lightning_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal"), lightning_refusals():
        int("x")


# -- subcommands and checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_a_subcommand_that_a_module_has_nothing_for_is_refused(
    subcommand: str, tiny_shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = write_config(tmp_path / "run.yaml", gates_config(tiny_shards, tmp_path / "run"))
    line = error_line(refused(capsys, subcommand, "-c", config))
    assert f"LifespanGates is for fit and validate, not for {subcommand}: `python -m eval` measures" in line


def test_a_harvest_reads_no_checkpoint(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: Capture) -> None:
    path = harvest_config_at(tmp_path / "out", tiny_backbone, tiny_texts)
    line = error_line(refused(capsys, "predict", "-c", path, "--ckpt_path", "last"))
    assert "without --ckpt_path the same command goes on where it stopped" in line


@pytest.mark.parametrize(("subcommand", "given"), [("fit", "best"), ("validate", "best"), ("validate", "last")])
def test_a_checkpoint_that_is_not_there_is_refused(
    subcommand: str, given: str, tiny_shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = write_config(tmp_path / "run.yaml", gates_config(tiny_shards, tmp_path / "run"))
    line = error_line(refused(capsys, subcommand, "-c", config, "--ckpt_path", given))
    assert f"--ckpt_path {given}: the folders of this run have no last checkpoint; give a path" in line


@pytest.mark.filterwarnings("ignore")
def test_the_best_checkpoint_is_found_by_another_process(tiny_shards: Path, tmp_path: Path) -> None:
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), **MONITORED}}
    saving["init_args"] |= {"mode": "max"}  # the first is the largest
    config = write_config(tmp_path / "run.yaml", gates_config(tiny_shards, tmp_path / "run", callbacks=[saving]))
    run_cli("fit", "-c", config)
    best = tmp_path / "kept/step=10.ckpt"
    figure = torch.load(best, weights_only=True)["figures"]["val_loss"]
    run_cli("validate", "-c", config, "--ckpt_path", "best")
    assert last_logged(tmp_path / "run")["val_loss"] == pytest.approx(figure, abs=1e-6)
    best.unlink()
    with pytest.raises(SmartKVError, match=r"step=10\.ckpt is gone"):
        best_checkpoint(tmp_path / "kept/last.ckpt", [ModelCheckpoint(monitor="val_loss", mode="max")])
    with pytest.raises(SmartKVError, match="knows no best checkpoint"):
        best_checkpoint(tmp_path / "kept/last.ckpt", [])
