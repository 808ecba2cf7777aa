"""Runs of `fit`: any number of processes, checkpoints that can be gone on from, mistakes told in one line."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smartkv.shards.manifest import Manifest, shard_entry
from smartkv.shards.shard_file import read_header, write_shard
from tests.lightning_fixtures import (
    STEPS_AN_EPOCH,
    TORCHRUN,
    Watcher,
    error_line,
    fit,
    gates_config,
    last_logged,
    logged,
    refused,
    run_cli,
    run_command,
    weights,
    write_config,
)

# -- processes and checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validate_from_a_checkpoint_gives_the_figures_of_the_fit(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path
) -> None:
    config = write_config(tmp_path.with_name(f"{tmp_path.name}-validate.yaml"), gates_config(tiny_shards, tmp_path))
    run_cli("validate", "-c", config, "--ckpt_path", root / "checkpoints" / f"step={2 * STEPS_AN_EPOCH}.ckpt")
    assert last_logged(tmp_path)["val_r2_mean"] == pytest.approx(last_logged(root)["val_r2_mean"], abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_reach_the_figures_of_one(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path, strategy: str
) -> None:
    config = gates_config(tiny_shards, tmp_path, trainer={"devices": 2, "strategy": strategy})
    path = write_config(tmp_path.with_name(f"{tmp_path.name}-two.yaml"), config)
    if strategy == "ddp":
        run_command("fit", "-c", path)  # a real command line, which starts both processes anew
    else:
        run_cli("fit", "-c", path)
    ours, theirs = logged(tmp_path), logged(root)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert {"train_loss", "val_r2_head/L01H0"} <= {name for row in theirs for name in row}
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, abs=1e-3)  # every head's figures, and every step's loss


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_two_processes_find_the_very_figures_of_one_for_the_same_gates(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path
) -> None:
    figures = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        out = tmp_path / str(devices)
        config = gates_config(tiny_shards, out, trainer={"devices": devices, "strategy": strategy})
        path = write_config(tmp_path / f"{devices}.yaml", config)
        run_cli("validate", "-c", path, "--ckpt_path", root / "checkpoints" / f"step={STEPS_AN_EPOCH}.ckpt")
        figures.append(last_logged(out))
    one, two = figures
    assert "val_r2_head/L01H0" in one and two == pytest.approx(one, abs=2e-6)  # batches of other sizes, in float32


@pytest.mark.slow
def test_torchrun_reaches_the_figures_of_one_process(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path
) -> None:
    config = gates_config(tiny_shards, tmp_path / "out", trainer={"devices": 2, "strategy": "ddp"})
    path = write_config(tmp_path / "two.yaml", config)
    run_command("fit", "-c", path, launcher=TORCHRUN)
    assert last_logged(tmp_path / "out")["val_r2_mean"] == pytest.approx(last_logged(root)["val_r2_mean"], abs=1e-3)


def test_the_same_seed_gives_the_same_gates(tiny_shards: Path, trained: Watcher, tmp_path: Path) -> None:
    again = weights(fit(tiny_shards, tmp_path).module)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(trained.module).items())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("step", [4, STEPS_AN_EPOCH, 14], ids=["first epoch", "between epochs", "second epoch"])
def test_a_resumed_fit_ends_with_the_weights_and_figures_of_the_uninterrupted_one(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path, step: int
) -> None:
    config = gates_config(tiny_shards, tmp_path, callbacks=[{"class_path": "tests.lightning_fixtures.Watcher"}])
    checkpoint = root / "checkpoints" / f"step={step}.ckpt"
    run_cli(
        "fit",
        "-c",
        write_config(tmp_path.with_name(f"{tmp_path.name}-resumed.yaml"), config),
        "--ckpt_path",
        checkpoint,
    )
    resumed = Watcher.last
    assert resumed.steps[-1] == 2 * STEPS_AN_EPOCH
    for name, tensor in weights(trained.module).items():
        torch.testing.assert_close(weights(resumed.module)[name], tensor, rtol=0, atol=1e-6)
    for mine, theirs in zip(resumed.module.loss_history, trained.module.loss_history, strict=True):
        assert mine == {name: pytest.approx(figures, abs=1e-6) for name, figures in theirs.items()}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_two_processes_go_on_to_the_mean_losses_of_one(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path
) -> None:
    """From a checkpoint of one process, in the middle of an epoch; what they save themselves is what one saves."""
    often = {"dirpath": str(tmp_path), "every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    saving = {"class_path": "ModelCheckpoint", "init_args": often}
    ddp = {"devices": 2, "strategy": "ddp_fork"}
    config = write_config(tmp_path / "two.yaml", gates_config(tiny_shards, tmp_path, trainer=ddp, callbacks=[saving]))
    run_cli("fit", "-c", config, "--ckpt_path", root / "checkpoints/step=14.ckpt")
    mine, theirs = last_logged(tmp_path), last_logged(root)
    names = [name for name in theirs if name.startswith("train_loss_head/")]
    assert names and [mine[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-3)
    paths = tmp_path / "step=18.ckpt", root / "checkpoints/step=18.ckpt"
    ours, one = (torch.load(path, weights_only=True)["train_loss_head"] for path in paths)
    assert ours["rows"] == one["rows"]
    torch.testing.assert_close(ours["total"], one["total"], rtol=1e-3, atol=0)


def test_checkpoints_hold_nothing_that_needs_unpickling(root: Path, trained: Watcher) -> None:
    checkpoint = torch.load(root / "checkpoints" / "step=14.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 14


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_goes_on_from_what_slurms_signal_left_where_that_is_newer(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoints = {"dirpath": str(tmp_path / "checkpoints"), "save_last": True}
    config = gates_config(
        tiny_shards, tmp_path, callbacks=[{"class_path": "ModelCheckpoint", "init_args": checkpoints}]
    )
    left = [(2, tmp_path / "checkpoints" / "last.ckpt"), (4, tmp_path / "hpc_ckpt_1.ckpt")]
    for seconds, (step, path) in enumerate(left):
        shutil.copy(root / "checkpoints" / f"step={step}.ckpt", path)
        os.utime(path, (1e9 + seconds, 1e9 + seconds))
    run_cli("fit", "-c", write_config(tmp_path / "fit.yaml", config), "--ckpt_path", "last")
    steps = [row["step"] for row in logged(tmp_path) if "train_loss" in row]
    assert min(steps) == 4  # steps count from 0, and 4 were done


def test_a_checkpoint_of_another_batch_size_stops_with_one_line(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path.with_name(f"{tmp_path.name}-other.yaml"), gates_config(tiny_shards, tmp_path, data={"batch_size": 48})
    )
    said = refused(capsys, "fit", "-c", config, "--ckpt_path", root / "checkpoints" / "step=4.ckpt")
    assert "the same rows cannot follow" in error_line(said)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "value"), [("train", "nan"), ("validation", "nan"), ("train", "-inf")])
def test_keys_that_are_not_finite_stop_with_one_line_naming_the_file(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, value: str
) -> None:
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    path = shards / f"{split}-00001.safetensors"
    tensors = load_file(path)
    tensors["keys"][1, 1, 10, 3] = float(value)
    write_shard(path, tensors, read_header(path))
    manifest = Manifest.read(tiny_shards)  # and the manifest as a harvest would have left it
    entries = [shard_entry(shards / entry.file, entry.split, entry.windows, entry.tokens) for entry in manifest.shards]
    replace(manifest, folder=shards, shards=entries).write()
    config = write_config(tmp_path / "fit.yaml", gates_config(shards, tmp_path / "fit"))
    said = error_line(refused(capsys, "fit", "-c", config))
    assert f"{path} holds keys that are NaN or infinite" in said


def test_a_missing_shards_folder_stops_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tmp_path / "gone", tmp_path / "fit"))
    assert str(tmp_path / "gone") in error_line(refused(capsys, "fit", "-c", config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"lerning_rate": 0.1}}, "lerning_rate"),
        ({"data": {"treshold": 0.1}}, "treshold"),
        ({"trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"model": {"objective": {"class_path": "smartkv.gates.objectives.Log4Lifespam"}}}, "Log4Lifespam"),
        ({"data": {"inputs": "kyes"}}, "kyes"),
    ],
    ids=["model", "data", "trainer", "objective", "inputs"],
)
def test_a_misspelt_setting_is_named_without_a_traceback(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], named: str
) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "fit", **change))
    assert named in refused(capsys, "fit", "-c", config, status=None)


@pytest.mark.parametrize(("name", "value"), [("hidden", 0), ("learning_rate", -0.1)])
def test_a_setting_that_makes_no_sense_stops_with_one_line(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "fit", model={name: value}))
    assert f"{name} must be above 0, got {value}" in error_line(refused(capsys, "fit", "-c", config))


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        ("HeadDashboard", "HeadDashboard draws R²"),
        ("GateExport", "GateExport monitors val_r2_mean, which is not logged"),
    ],
)
def test_a_callback_that_needs_r2_says_that_an_objective_has_none(
    callback: str, said: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"class_path": "smartkv.gates.objectives.Ranking", "init_args": {"pairs": 2}}
    arguments = {"out": str(tmp_path / "export")} if callback == "GateExport" else {}
    callbacks = [{"class_path": callback, "init_args": arguments}]
    config = gates_config(tiny_shards, tmp_path / "fit", model={"objective": objective}, callbacks=callbacks)
    assert said in error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config)))


@pytest.mark.gpu
def test_a_fit_on_the_gpu_is_a_fit_on_the_cpu(tiny_shards: Path, trained: Watcher, root: Path, tmp_path: Path) -> None:
    fit(tiny_shards, tmp_path, trainer={"accelerator": "gpu"})
    mine, theirs = last_logged(tmp_path), last_logged(root)
    assert mine["val_r2_mean"] == pytest.approx(theirs["val_r2_mean"], abs=0.02)
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=0.02)
