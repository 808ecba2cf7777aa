"""Configs of version 0.1 that moved are answered with what replaces them."""

from pathlib import Path

import pytest

from cli.moved_configs import MOVED_CONFIGS
from tests.configs import FOLDER, files_of
from tests.lightning_fixtures import ROOT, error_line, refused


@pytest.mark.parametrize("old", MOVED_CONFIGS)
def test_a_config_that_moved_is_gone_and_those_that_replace_it_are_there(old: str) -> None:
    new = [FOLDER / name for name in MOVED_CONFIGS[old]]
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
