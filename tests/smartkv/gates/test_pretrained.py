"""Gates that come with SmartKV."""

import json
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

from smartkv import GateBank, SmartKVError, policy_of, pretrained_gates
from smartkv.gates.pretrained import PRETRAINED
from tests.conftest import ROOT
from tests.models import llama

NAMES = pretrained_gates()


def test_gates_come_with_smartkv() -> None:
    assert "smollm2-135m-instruct" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_gates_that_come_along_load_by_name_without_a_network(name: str) -> None:
    bank = GateBank.from_pretrained(name)
    assert bank.layers == list(range(bank.fingerprint.layers))
    for footprint in (0.125, 0.25, 0.5):
        assert policy_of(bank, footprint).price is not None


@pytest.mark.parametrize("name", NAMES)
def test_gates_that_come_along_are_small_and_say_how_they_were_made(name: str) -> None:
    folder = PRETRAINED / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2_000_000
    config = json.loads((folder / "config.json").read_text())
    training = config["details"]["training"]
    assert training["backbone"] and training["sources"] and training["settings"]["ages"]
    written = (folder / "config.json").read_text() + (folder / "README.md").read_text()
    assert "/tmp" not in written and str(Path.home()) not in written
    assert f'LifespanCache(model, gates="{name}"' in (folder / "README.md").read_text()


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAMES[0]).mkdir()
    with pytest.raises(SmartKVError, match="is not a folder of exported gates"):
        GateBank.from_pretrained(NAMES[0])


def test_who_asks_for_gates_that_are_nowhere_is_told_which_come_along() -> None:
    with pytest.raises(SmartKVError, match=f"shipped with SmartKV: .*{NAMES[0]}"):
        GateBank.from_pretrained("smollm2-135m-instrukt")


def test_gates_of_another_model_are_refused() -> None:
    with pytest.raises(SmartKVError, match="30 layers × 3 KV heads"):
        GateBank.from_pretrained("smollm2-135m-instruct", llama())


def test_the_wheel_carries_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "smartkv").symlink_to(ROOT / "smartkv")
    monkeypatch.chdir(source)
    wheel = build_meta.build_wheel(str(tmp_path))
    packed = set(zipfile.ZipFile(tmp_path / wheel).namelist())
    wanted = {f"smartkv/pretrained/{name}/{file.name}" for name in NAMES for file in (PRETRAINED / name).iterdir()}
    assert wanted and wanted <= packed
