"""The command line: moved configs, settings that no class takes, and the files of a run."""

from pathlib import Path
from typing import Any

import pytest

import main
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from smartkv.io.locks import LOCK
from tests.configs import FOLDER, files_of
from tests.lightning_fixtures import ROOT, error_line, fit, gates_config, refused, write_config

# -- configs of version 0.1 that moved --------------------------------------------------------------------------------


@pytest.mark.parametrize("old", main.MOVED_CONFIGS)
def test_a_config_that_moved_is_gone_and_those_that_replace_it_are_there(old: str) -> None:
    new = [FOLDER / name for name in main.MOVED_CONFIGS[old]]
    assert not (FOLDER / old).exists() and files_of(new[-1]) == new


@pytest.mark.parametrize("option", [["-c", "{}"], ["--config", "{}"], ["--config={}"]], ids=" ".join)
@pytest.mark.parametrize("folder", ["", "./", f"{ROOT}/"])
def test_an_old_path_is_answered_with_the_new_options(
    option: list[str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = f"{folder}configs/eit/smollm2-window.yaml"
    line = error_line(refused(capsys, "fit", *(part.format(old) for part in option), "--ckpt_path", "last"))
    base, overlay = (f"-c {folder}configs/eviction_tuning/{name}.yaml" for name in ("base", "window"))
    assert f"{old} has moved" in line and f"{base} {overlay}".replace("./", "") in line.replace("./", "")


def test_a_file_of_the_user_s_own_with_an_old_name_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs/gates/books.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("model: {class_path: NoSuchClass}\n")
    assert "NoSuchClass" in refused(capsys, "fit", "-c", "configs/gates/books.yaml")


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
