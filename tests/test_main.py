"""The command line: settings that no class takes, and the files of a run."""

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import FitProgress
from eval.__main__ import main as measurements
from eval.common.interrupts import STEP
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from smartkv import LifespanCache, Manifest, load_backbone
from smartkv.io.locks import LOCK
from tests.lightning_fixtures import (
    error_line,
    fit,
    gates_config,
    harvest,
    harvest_config,
    last_logged,
    refused,
    run_cli,
    run_command,
    write_config,
)
from tests.test_configs import printed_config
from tests.tuning_fixtures import config as tuning_config
from tests.tuning_fixtures import write_long_texts

# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("data", {"batch_size": None}, "data.batch_size must not be null"),
        ("model", {"hidden": None}, "model.hidden must not be null"),
    ],
)
def test_null_is_refused_where_a_setting_has_no_such_value(
    part: str, settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = gates_config(tmp_path / "shards", tmp_path / "run", **{part: settings})
    assert message in error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config)))


def test_a_second_config_changes_what_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tmp_path / "none", tmp_path / "run"))
    overlay = write_config(tmp_path / "overlay.yaml", {"data": {"init_args": {"shards": str(tmp_path / "other")}}})
    assert str(tmp_path / "other") in error_line(refused(capsys, "fit", "-c", config, "-c", overlay))


# -- a run's files ----------------------------------------------------------------------------------------------------


def test_a_fit_locks_its_folder_and_writes_checkpoints_atomically(tiny_shards: Path, tmp_path: Path) -> None:
    trainer = fit(tiny_shards, tmp_path / "run", trainer={"max_epochs": 1}).module.trainer
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    assert (tmp_path / "run" / LOCK).is_file()


def test_a_checkpoint_plugin_of_the_config_s_is_kept(tiny_shards: Path, tmp_path: Path) -> None:
    plugin = {"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}
    trainer = fit(tiny_shards, tmp_path / "run", trainer={"max_epochs": 1, "plugins": [plugin]}).module.trainer
    assert type(trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"


# -- the end of a run -------------------------------------------------------------------------------------------------


def exporting(shards: Path, root: Path, *callbacks: dict[str, Any]) -> Path:
    """The config of a fit of one epoch that exports gates."""
    saved = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "enable_version_counter": False}}
    listed = [{"class_path": "GateExport"}, saved, *callbacks]
    config = gates_config(shards, root, callbacks=listed, trainer={"max_epochs": 1})
    return write_config(root.with_name(f"{root.name}.yaml"), config)


def test_a_fit_ends_with_the_export_what_it_achieved_and_the_next_step(
    tiny_shards: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli("fit", "-c", exporting(tiny_shards, tmp_path / "run"))
    best, use, measure = capsys.readouterr().out.splitlines()[-3:]
    export, r2 = tmp_path / "run/export", last_logged(tmp_path / "run")["val_r2_mean"]
    assert best == f"best gates, of epoch 1: {export} (val_r2_mean {r2:.4f})"
    code = use.removeprefix("use them:").strip()
    cache = eval(code, {"LifespanCache": LifespanCache, "model": load_backbone(str(tiny_backbone)).model})
    assert isinstance(cache, LifespanCache)
    command = shlex.split(measure.removeprefix("measure them:"))
    assert command[:4] == ["python", "-m", "eval", "perplexity"] and str(export) in command
    with pytest.raises(SystemExit) as stop:
        measurements([*command[3:], "--print_config"])
    assert stop.value.code == 0


def test_a_harvest_ends_with_the_command_that_trains_gates(
    tiny_backbone: Path, tiny_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(tmp_path / "a folder", tiny_backbone, tiny_texts, windows={"train": 1, "validation": 1})
    last = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(last.removeprefix("train gates:"))
    assert command[:3] == ["python", "main.py", "fit"]
    printed = printed_config(*command[2:])
    assert printed["data"]["init_args"]["shards"] == str(tmp_path / "a folder")


def test_a_tuning_ends_with_the_adapter_and_the_command_that_measures_it(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    config = tuning_config(tmp_path / "run", tiny_backbone, write_long_texts(tmp_path / "texts"))
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 1}
    run_cli("fit", "-c", write_config(tmp_path / "tune.yaml", config))
    adapter, measure = capsys.readouterr().out.splitlines()[-2:]
    assert str(tmp_path / "run/final") in adapter and "nats a token" in adapter
    assert f"--adapter {tmp_path / 'run/final'}" in measure


class Interrupting(L.Callback):
    """Ctrl-C after the first validation, or before the first step."""

    def __init__(self, early: bool = False) -> None:
        self.early = early

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.early:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    def on_predict_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C from the first one on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_line_of(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    """Run the CLI until it is interrupted; the words of the command that its line tells, after `main.py`."""
    with pytest.raises(SystemExit) as stop:
        run_cli(*args)
    said = capsys.readouterr().err
    assert stop.value.code == 130 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("interrupted")]
    assert said.rstrip().endswith(line)
    return shlex.split(line.partition("with: ")[2])[2:]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_fit_says_the_command_that_goes_on(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(exporting(tiny_shards, tmp_path / "run", {"class_path": "tests.test_main.Interrupting"}))
    command = interrupted_line_of(capsys, "fit", "-c", config, "--overwrite", "--trainer.max_epochs", "3")
    assert command == ["fit", "-c", config, "--trainer.max_epochs", "3", "--ckpt_path", "last"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupting, "on_train_epoch_end", lambda *_: None)
        run_cli(*command)
    assert last_logged(tmp_path / "run")["epoch"] == 2


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_step_of_another_command_is_quiet(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(STEP, "1")
    config = exporting(tiny_shards, tmp_path / "run", {"class_path": "tests.test_main.Interrupting"})
    with pytest.raises(SystemExit) as stop:
        run_cli("fit", "-c", config, "--trainer.max_epochs", "2")
    assert stop.value.code == 130 and "interrupted" not in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_harvest_goes_on_by_the_same_command(
    tiny_backbone: Path, tiny_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [{"class_path": "ShardWriter"}, {"class_path": "tests.test_main.Interrupting"}]
    config = harvest_config(tmp_path / "shards", tiny_backbone, tiny_texts, trainer={"callbacks": listed})
    args = ["predict", "-c", str(write_config(tmp_path / "harvest.yaml", config))]
    assert interrupted_line_of(capsys, *args, "--overwrite") == args
    assert len(list((tmp_path / "shards").glob("*-*.safetensors"))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupting, "on_predict_batch_end", lambda *_: None)
        run_cli(*args)
    assert Manifest.read(tmp_path / "shards").shards


@pytest.mark.usefixtures("interruptible")
def test_a_fit_that_is_interrupted_before_its_first_checkpoint_says_to_begin_again(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = {"class_path": "tests.test_main.Interrupting", "init_args": {"early": True}}
    args = ["fit", "-c", str(exporting(tiny_shards, tmp_path / "run", early))]
    assert interrupted_line_of(capsys, *args) == args


@pytest.mark.parametrize("callbacks", [[], [{"class_path": "RichProgressBar"}]], ids=["default", "named"])
def test_lightning_s_progress_bar_counts_epochs_from_one_too(
    callbacks: list[dict[str, Any]], tiny_shards: Path, tmp_path: Path
) -> None:
    trainer = {"max_epochs": 1, "enable_progress_bar": True}
    bar = fit(tiny_shards, tmp_path / "run", callbacks=callbacks, trainer=trainer).module.trainer.progress_bar_callback
    assert type(bar) is FitProgress


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "word"), [("99", "CPU cores"), ("2", "manifest.json is missing")])
def test_a_mistake_is_told_before_other_processes_are_started(
    devices: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tmp_path / "none", tmp_path / "run"))
    assert word in error_line(refused(capsys, "fit", "-c", config, "--trainer.devices", devices))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tmp_path / "none", tmp_path / "run"))
    assert error_line(refused(capsys, "fit", "-c", config, "--trainer.accelerator", "gpu"))


def test_two_processes_print_no_warnings(tiny_shards: Path, tmp_path: Path) -> None:
    config = exporting(tiny_shards, tmp_path / "run")
    done = run_command("fit", "-c", config, "--trainer.devices", "2")
    assert "sync_dist" not in done and "Warning" not in done


def test_a_checkpoint_that_is_not_there_is_told_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tmp_path / "none", tmp_path / "run"))
    line = error_line(refused(capsys, "fit", "-c", config, "--ckpt_path", "nope.ckpt"))
    assert line == "error: there is no checkpoint nope.ckpt: give the path of one, or 'last'"


@pytest.mark.parametrize("command", ["fit", "predict", "validate"])
def test_a_command_without_a_config_names_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(refused(capsys, command))
    assert Path(line.split("-c ")[1].split()[0]).exists()
