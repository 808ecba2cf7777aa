"""A run goes on with the settings of its checkpoint: others are refused with both values, whichever way it is given."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_fixtures import (
    Watcher,
    error_line,
    fit,
    gates_config,
    refused,
    run_cli,
    write_config,
)

HALFWAY = "step=4.ckpt"
OBJECTIVES = "smartkv.gates.objectives"


def with_last(root: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """A ModelCheckpoint whose last.ckpt is the one of half-way."""
    shutil.copy(root / "checkpoints" / HALFWAY, tmp_path / "last.ckpt")
    saving = {"dirpath": str(tmp_path), "save_last": True, "enable_version_counter": False}
    return [{"class_path": "ModelCheckpoint", "init_args": saving}]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"learning_rate": 0.1}, "learning_rate 0.003, now 0.1"),
        ({"weight_decay": 0.5, "warmup_steps": 3}, "weight_decay 0.01, now 0.5; warmup_steps 2, now 3"),
        ({"hidden": 16}, "hidden 8, now 16"),
        (
            {"objective": {"class_path": f"{OBJECTIVES}.Log4Lifespan", "init_args": {"loss": "mse"}}},
            "objective.loss huber, now mse",
        ),
        ({"objective": {"class_path": f"{OBJECTIVES}.Ranking"}}, "objective Log4Lifespan, now Ranking"),
    ],
)
@pytest.mark.parametrize("by", ["file", "last"])
def test_another_setting_is_refused_with_both_values(
    by: str,
    model: dict[str, Any],
    said: str,
    tiny_shards: Path,
    root: Path,
    trained: Watcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = gates_config(tiny_shards, tmp_path / "run", model=model, callbacks=with_last(root, tmp_path))
    given = tmp_path / "last.ckpt" if by == "file" else "last"
    line = error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config), "--ckpt_path", given))
    assert f"is of another run: {said}. Give" in line


def test_a_setting_on_the_command_line_is_refused_too(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "run"))
    options = ("--ckpt_path", root / "checkpoints" / HALFWAY, "--model.init_args.learning_rate", "0.1")
    assert "learning_rate 0.003, now 0.1" in error_line(refused(capsys, "fit", "-c", config, *options))


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_may_become_longer(tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path) -> None:
    config = gates_config(tiny_shards, tmp_path / "run", trainer={"max_epochs": 3}, callbacks=with_last(root, tmp_path))
    run_cli("fit", "-c", write_config(tmp_path / "fit.yaml", config), "--ckpt_path", "last")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.filterwarnings("ignore")
def test_a_validation_needs_only_the_settings_that_decide_its_figures(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = root / "checkpoints" / HALFWAY
    for model, said in (({"learning_rate": 0.1, "weight_decay": 0.5}, None), ({"hidden": 16}, "hidden 8, now 16")):
        config = write_config(tmp_path / "run.yaml", gates_config(tiny_shards, tmp_path / "run", model=model))
        if said is None:
            run_cli("validate", "-c", config, "--ckpt_path", checkpoint)
        else:
            assert said in error_line(refused(capsys, "validate", "-c", config, "--ckpt_path", checkpoint))


@pytest.mark.parametrize(
    ("data", "said"),
    [({"batch_size": 48, "seed": 1}, "batch_size 24, now 48"), ({"layers": "1"}, "layers 0-1, now 1")],
)
def test_other_data_is_refused_by_what_differs(
    data: dict[str, Any],
    said: str,
    tiny_shards: Path,
    root: Path,
    trained: Watcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "run", data=data))
    line = error_line(refused(capsys, "fit", "-c", config, "--ckpt_path", root / "checkpoints" / HALFWAY))
    assert said in line and "threshold" not in line


def tampered(path: Path, out: Path, change: Any) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, out)
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["settings"].update(model="DistilledGates"), "model DistilledGates, now LifespanGates"),
        (lambda c: c["settings"].update(data="OnlineKeys"), "data OnlineKeys, now LifespanShards"),
        (lambda c: (c.pop("settings"), c.pop("hyper_parameters")), "is not of a LifespanGates"),
        (lambda c: c.pop("optimizer_states"), "holds weights alone"),
        (
            lambda c: c["state_dict"].update({"bank.bias1": torch.zeros(4, 9)}),
            "bank.bias1 has shape [4, 9], now [4, 1, 8]",
        ),
    ],
    ids=["module", "data", "none", "weights", "shapes"],
)
def test_a_checkpoint_of_another_kind_is_refused(
    change: Any,
    said: str,
    tiny_shards: Path,
    root: Path,
    trained: Watcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tampered(root / "checkpoints" / HALFWAY, tmp_path / "other.ckpt", change)
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "run"))
    assert said in error_line(refused(capsys, "fit", "-c", config, "--ckpt_path", path))


def test_a_checkpoint_of_version_0_1_is_compared_by_its_hyperparameters(
    tiny_shards: Path, root: Path, trained: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tampered(root / "checkpoints" / HALFWAY, tmp_path / "old.ckpt", lambda c: c.pop("settings"))
    config = gates_config(tiny_shards, tmp_path / "run", model={"learning_rate": 0.1})
    line = error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config), "--ckpt_path", path))
    assert "another run: learning_rate 0.003, now 0.1. Give" in line


@pytest.mark.filterwarnings("ignore")
def test_weights_alone_can_be_validated(tiny_shards: Path, tmp_path: Path) -> None:
    saving = {"dirpath": str(tmp_path), "save_weights_only": True, "filename": "weights"}
    fit(tiny_shards, tmp_path / "run", callbacks=[{"class_path": "ModelCheckpoint", "init_args": saving}])
    config = write_config(tmp_path / "validate.yaml", gates_config(tiny_shards, tmp_path / "validated"))
    run_cli("validate", "-c", config, "--ckpt_path", tmp_path / "weights.ckpt")
    assert (tmp_path / "validated/metrics.csv").is_file()
