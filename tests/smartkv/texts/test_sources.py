"""A source's settings, and the origin that it is taken from."""

import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig, resolve_source
from tests.smartkv.texts.fixtures import quiet

# -- where a source is taken from -------------------------------------------------------------------------------------


def test_the_origin_that_is_used_is_said(local_data: Path) -> None:
    lines: list[str] = []
    assert resolve_source(SourceConfig("gsm8k"), lines.append).origin == "local"
    assert lines == ["source 'gsm8k': local"]


def test_recall_announces_itself_with_the_text_that_it_uses(local_data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    assert resolve_source(SourceConfig("recall"), lines.append).name == "recall"
    assert lines == ["source 'recall' (its text is pg19): local"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    assert resolve_source(SourceConfig("recall", path=str(tmp_path / "mine")), lines.append).recall
    assert lines[1] == f"source 'recall': 1 file in {tmp_path / 'mine'}"


def test_recall_that_cannot_be_had_is_named_so(no_data: None) -> None:
    with pytest.raises(SmartKVError, match=r"source 'recall' \(its text is pg19\) cannot be had"):
        resolve_source(SourceConfig("recall", origins=["local"]), quiet)
    lines: list[str] = []
    source = resolve_source(SourceConfig("recall", origins=["local", "builtin"]), lines.append)
    assert "source 'recall' (its text is pg19) CANNOT BE HAD" in lines[0]
    assert (source.name, source.origin, source.recall) == ("recall", "builtin", "books")


def test_the_built_in_prose_that_is_asked_for_is_no_lack(no_data: None) -> None:
    lines: list[str] = []
    assert resolve_source(SourceConfig("recall", origins=["builtin"]), lines.append).recall
    assert lines == ["source 'recall' (its text is pg19): the built-in prose, the manual of Python itself"]


def test_the_first_origin_that_can_be_had_is_used(local_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_source(SourceConfig("gsm8k", origins=["hub", "local"]), quiet).origin == "local"


def test_a_source_that_cannot_be_had_stops_and_names_each_origin_tried(no_data: None) -> None:
    with pytest.raises(SmartKVError, match=r"pg19.*local: \$SMARTKV_DATA is not set.*hub: HF_HUB_OFFLINE is set"):
        resolve_source(SourceConfig("pg19"), quiet)


def test_a_data_folder_without_the_source_is_named(
    no_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    with pytest.raises(SmartKVError, match=str(tmp_path / "books" / "train")):
        resolve_source(SourceConfig("pg19"), quiet)


def test_builtin_prose_in_place_of_a_source_is_said_loudly(no_data: None) -> None:
    lines: list[str] = []
    resolve_source(SourceConfig("pg19", origins=["local", "hub", "builtin"]), lines.append)
    assert len(lines) == 1
    assert "'pg19' CANNOT BE HAD" in lines[0] and "HF_HUB_OFFLINE" in lines[0]


def test_builtin_prose_in_place_of_a_source_is_named_builtin_with_the_source_s_share(no_data: None) -> None:
    source = resolve_source(SourceConfig("pg19", weight=0.7, origins=["local", "builtin"]), quiet)
    assert (source.name, source.origin, source.weight) == ("builtin", "builtin", 0.7)


@pytest.mark.parametrize("name", ["pg19", "c4"])
def test_an_offline_hub_answers_quickly(no_data: None, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(SmartKVError):
        resolve_source(SourceConfig(name, origins=["hub"]), quiet)
    assert time.monotonic() - start < 5


def test_a_hub_that_does_not_answer_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(SmartKVError, match="emozilla/pg19 does not answer"):
        resolve_source(SourceConfig("pg19", origins=["hub"]), quiet)
    assert time.monotonic() - start < 5


def test_web_pages_are_the_first_of_two_sets_that_an_origin_has(local_data: Path) -> None:
    lines: list[str] = []
    assert next(resolve_source(SourceConfig("web"), lines.append).documents("train")).text.startswith("lesson")
    (local_data / "webtext/fineweb_edu.jsonl").unlink()
    source = resolve_source(SourceConfig("web"), lines.append)
    assert next(source.documents("train")).text.startswith("page")
    assert lines == ["source 'web': local fineweb_edu", "source 'web': local c4"]
    assert (source.name, source.origin, source.about) == ("web", "local", {"text": "c4"})


def test_web_pages_that_cannot_be_had_name_both_sets(no_data: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    with pytest.raises(SmartKVError, match=r"'web' cannot be had \(local: .*fineweb_edu\.jsonl.*local: .*c4_sample"):
        resolve_source(SourceConfig("web"), quiet)


def test_code_needs_neither_data_nor_the_hub(no_data: None) -> None:
    lines: list[str] = []
    source = resolve_source(SourceConfig("code"), lines.append)
    assert source.origin == "installed" and source.about["packages"] > 50
    assert f" files of {source.about['packages']} installed packages and modules" in lines[0]


def test_a_folder_of_code_is_read_as_code_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("print(1)")
    assert resolve_source(SourceConfig("code", path=str(tmp_path)), quiet).own is not None
    with pytest.raises(SmartKVError, match=r"'mine': .* holds only files that are not read \(1 \.py\)"):
        resolve_source(SourceConfig("mine", path=str(tmp_path)), quiet)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_refused_with_those_there_are() -> None:
    with pytest.raises(SmartKVError, match=r"'pg20' is unknown: expected pg19, gsm8k"):
        resolve_source(SourceConfig("pg20"), quiet)


def test_an_unknown_origin_is_refused_with_those_there_are() -> None:
    with pytest.raises(SmartKVError, match=r"'pg19': origin 'disk' is unknown: expected some of local, hub, builtin"):
        resolve_source(SourceConfig("pg19", origins=["disk"]), quiet)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_that_is_not_above_zero_is_refused(weight: float) -> None:
    with pytest.raises(SmartKVError, match="'builtin': weight"):
        resolve_source(SourceConfig("builtin", weight=weight), quiet)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=f"'mine': path {tmp_path / 'gone'}"):
        resolve_source(SourceConfig("mine", path=str(tmp_path / "gone")), quiet)


@pytest.mark.parametrize(("name", "why"), [("code", "installed"), ("recall_code", "installed"), ("lists", "drawn")])
def test_a_source_that_is_in_one_place_is_not_looked_for_on_the_hub(name: str, why: str) -> None:
    with pytest.raises(SmartKVError, match=f"source '{name}' is not on the hub: .*{why}.* Leave its origins out"):
        resolve_source(SourceConfig(name, origins=["hub"]), lambda line: None)
