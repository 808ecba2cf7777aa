"""The default mix: what of it can be had, and what takes the place of the rest."""

import json
from pathlib import Path

import pytest

from cli.recipe.mix import MIX, Part, default_mix, own_mix
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig
from tests.lightning_fixtures import prose


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that has books and nothing else."""
    for split in ("train", "validation", "test"):
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "a.txt").write_text(prose(400, 0))
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    return tmp_path


def test_no_kind_of_the_default_mix_is_above_a_third_and_all_is_shared_out() -> None:
    kinds = {part.kind: sum(each.weight for each in MIX if each.kind == part.kind) for part in MIX}
    assert max(kinds.values()) <= 1 / 3 and sum(kinds.values()) == pytest.approx(1)
    assert len({part.name for part in MIX}) == len(MIX)


def test_what_cannot_be_had_is_left_out_and_told(books: Path) -> None:
    said: list[str] = []
    names = [part.name for part in default_mix(said.append)]
    assert names[:2] == ["pg19", "recall"] and "lists" in names and "builtin" not in names
    (line,) = [line for line in said if line.startswith("left out: gsm8k ")]
    assert "5% of the mix" in line and "gsm8k/train.jsonl does not exist" in line and "HF_HUB_OFFLINE is set" in line
    assert len(said) == len(MIX) - len(names)


def test_a_source_that_this_version_lacks_is_left_out_and_told(books: Path) -> None:
    said: list[str] = []
    parts = default_mix(said.append, (MIX[0], Part("songs", "songs", 0.5)))
    assert [part.name for part in parts] == ["pg19"]
    assert said == ["left out: songs (50% of the mix): this version of SmartKV has no such source"]


def test_a_part_keeps_the_origin_that_has_it(books: Path) -> None:
    assert [part.origins for part in default_mix(lambda line: None, MIX[:2])] == [["local"], ["local"]]


def test_without_prose_the_manual_of_python_takes_its_share_with_facts_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    said: list[str] = []
    parts = default_mix(said.append, tuple(part for part in MIX if part.kind in ("books", "lists", "maths")))
    weights = {(part.kind, part.name): part.weight for part in parts}
    assert weights == {("lists", "lists"): 0.05, ("manual", "builtin"): 0.15, ("manual", "recall"): 0.10}
    assert all(part.origins == ["builtin"] for part in parts if part.kind == "manual")
    assert any("manual of Python" in line for line in said)


def test_a_part_stands_in_a_config_as_a_source() -> None:
    part = Part("books", "pg19", 0.15, ["local"])
    assert part.source == {"name": "pg19", "weight": 0.15, "origins": ["local"]}
    assert SourceConfig(**Part("mine", "mine", 1.0, path="/x").source).path == "/x"
    assert json.dumps(part.source)


def test_facts_are_taught_and_not_measured_as_a_text() -> None:
    assert [part.name for part in MIX if not part.measured] == ["recall", "recall_code", "recall_chat", "lists"]


def test_each_source_of_the_users_own_is_a_kind(books: Path) -> None:
    (part,) = own_mix([SourceConfig("mine", 2.0, path=str(books / "books"))])
    assert (part.kind, part.name, part.weight, part.path) == ("mine", "mine", 2.0, str(books / "books"))


def test_own_sources_that_cannot_be_had_or_have_one_name_are_refused(books: Path) -> None:
    with pytest.raises(SmartKVError, match="source 'gsm8k' cannot be had"):
        own_mix([SourceConfig("gsm8k", origins=["local"])])
    with pytest.raises(SmartKVError, match="two sources are named 'pg19'"):
        own_mix([SourceConfig("pg19"), SourceConfig("pg19")])
