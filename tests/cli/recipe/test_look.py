"""The look at a model and its texts, before anything is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.recipe.look import Look, look
from cli.recipe.settings import Options
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig
from tests.cli.fixtures import a_look, look_here, write_own_texts
from tests.lightning_fixtures import prose
from tests.models import save_tiny_backbone


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_texts(tmp_path_factory.mktemp("own") / "texts")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.recipe.look.run_isolated", look_here)


def options(backbone: Path, texts: Path, **changes: Any) -> Options:
    sources = [SourceConfig("mine", path=str(texts))]
    return Options(**{"backbone": str(backbone), "size": "tiny", "dtype": "float32", "sources": sources} | changes)


def test_a_look_tells_what_it_sees(tiny_backbone: Path, texts: Path) -> None:
    said: list[str] = []
    seen = look(options(tiny_backbone, texts), said.append)
    assert (seen.layers, seen.kv_heads, seen.head_dim, seen.max_positions, seen.gated_layers) == (2, 2, 8, 512, 2)
    assert (seen.device, seen.threads) == ("cpu", 1) and seen.parameters > 10_000
    assert [(kind.name, kind.split) for kind in seen.kinds] == [("mine", "test")]
    assert all(seconds > 0 for seconds in seen.seconds.values())
    words = "\n".join(said)
    assert "2 KV heads of 8 dims: 4 gates" in words and "output of k_proj, checked on the model" in words


def test_a_look_is_json() -> None:
    assert Look.from_dict(json.loads(json.dumps(a_look().to_dict()))) == a_look()


def test_text_for_training_is_needed(tiny_backbone: Path, tmp_path: Path) -> None:
    texts = write_own_texts(tmp_path / "texts")
    for file in (texts / "train").iterdir():
        file.write_text("short")
    with pytest.raises(SmartKVError, match=r"source 'mine' cannot be learned from: .*no train window of 512 tokens"):
        look(options(tiny_backbone, texts), lambda line: None)


def test_a_line_that_cannot_be_read_is_told_as_the_cause(tiny_backbone: Path, tmp_path: Path) -> None:
    talk = json.dumps({"messages": [{"role": "user", "content": prose(1500, 1)}]})
    (tmp_path / "bad.jsonl").write_text("\n".join([talk] * 30 + ["no JSON"]))
    sources = [SourceConfig("chat", path=str(tmp_path / "bad.jsonl"))]
    with pytest.raises(SmartKVError, match=r"bad\.jsonl, line 31: not JSON"):
        look(options(tiny_backbone, tmp_path, sources=sources), lambda line: None)


def test_without_test_texts_the_report_reads_validation_texts_and_says_so(tiny_backbone: Path, tmp_path: Path) -> None:
    texts, said = write_own_texts(tmp_path / "texts"), list[str]()
    for file in (texts / "test").iterdir():
        file.write_text("short")
    seen = look(options(tiny_backbone, texts), said.append)
    assert seen.kinds[0].split == "validation"
    assert any(line.startswith("the report reads validation texts of mine: ") for line in said)


def test_a_model_that_does_not_fit_into_the_memory_is_refused_before_it_is_loaded(
    tiny_backbone: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.recipe.look._memory", lambda device: (1000, 2000))
    monkeypatch.setattr("cli.recipe.look.run_isolated", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(SmartKVError, match=r"the weights of '.*' take .* GB in float32, and cpu has 0\.0 GB of memory"):
        look(options(tiny_backbone, texts), lambda line: None)


def test_memory_that_is_short_in_the_work_is_told(
    tiny_backbone: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.recipe.look.run_isolated", lambda *_: {"note": "killed: out of memory"})
    with pytest.raises(SmartKVError, match=r"not enough memory for '.*' here \(killed: out of memory\)"):
        look(options(tiny_backbone, texts), lambda line: None)


def test_a_model_that_is_not_supported_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neo"}))
    with pytest.raises(SmartKVError, match="gpt_neo"):
        look(options(tmp_path, texts), lambda line: None)


def test_a_model_with_few_positions_learns_no_facts_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    said: list[str] = []
    seen = look(Options(str(save_tiny_backbone(tmp_path)), "tiny", dtype="float32"), said.append)
    assert "builtin" in [part.name for part in seen.parts] and all(part.measured for part in seen.parts)
    assert any(line.startswith("left out: lists ") and "256 positions have no room for facts" in line for line in said)
