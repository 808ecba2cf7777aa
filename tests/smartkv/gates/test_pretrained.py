"""Gates that come with SmartKV."""

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from setuptools import build_meta

from smartkv import GateBank, SmartKVError, policy_of, pretrained_gates
from smartkv.gates import pretrained
from smartkv.gates.pretrained import PRETRAINED, check_details
from tests.conftest import ROOT
from tests.models import llama

NAMES = pretrained_gates()


def test_gates_come_with_smartkv() -> None:
    assert {"smollm2-135m-instruct", "smollm2-135m-instruct-books", "qwen2.5-coder-0.5b-instruct"} == set(NAMES)


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


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


def test_a_mistyped_name_is_answered_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "hub_trouble", lambda: pytest.fail("the hub was asked"))
    for name in ("smollm2-135m-instrukt", Path("nobody/gates"), "./gates", "runs/no/gates", "/gone"):
        with pytest.raises(SmartKVError, match=f"gates '{name}' are neither a local folder") as refusal:
            GateBank.from_pretrained(name)
        assert ("did you mean 'smollm2-135m-instruct'?" in str(refusal.value)) is (name == "smollm2-135m-instrukt")


def test_a_hub_that_does_not_answer_is_told_at_once(unreachable_hub: None, caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with pytest.raises(SmartKVError, match=r"available from the hub \(the hub does not answer: .*refused"):
        GateBank.from_pretrained("nobody/gates")
    assert time.monotonic() - start < 2 and caplog.text == ""


def test_gates_that_were_downloaded_need_no_hub(
    unreachable_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--gates"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    bank = GateBank.from_pretrained(NAMES[0])
    bank.save_pretrained(folder / "snapshots" / "abc")
    assert torch.equal(GateBank.from_pretrained("somebody/gates").weight1, bank.weight1)


@pytest.mark.parametrize("name", [None, "", 3, ["a"]])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(SmartKVError, match=r"expected a folder of exported gates, a hub id, or the name .*, got "):
        GateBank.from_pretrained(name)


def test_a_file_of_gates_is_refused_with_its_folder(tmp_path: Path) -> None:
    GateBank.from_pretrained(NAMES[0]).save_pretrained(tmp_path)
    with pytest.raises(SmartKVError, match=f"is a file: give the folder of exported gates, '{tmp_path}'"):
        GateBank.from_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize("model", ["smollm2-135m", 3, llama().config])
def test_what_is_no_loaded_model_is_refused(model: Any) -> None:
    with pytest.raises(SmartKVError, match="model must be a loaded transformers model, got "):
        GateBank.from_pretrained(NAMES[0], model=model)


def test_gates_of_another_model_are_refused() -> None:
    with pytest.raises(SmartKVError, match="30 layers × 3 KV heads"):
        GateBank.from_pretrained("smollm2-135m-instruct", llama())


@pytest.mark.parametrize("point", [[0.5], [0.5, 1.0], [0.5, ["all"]], 0.5])
def test_layer_shares_of_another_form_are_refused(point: Any) -> None:
    assert check_details({"layer_shares": [[0.5, [0.2, 1.0]]]})
    with pytest.raises(ValueError, match="layer_shares must be"):
        check_details({"layer_shares": [point]})


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
