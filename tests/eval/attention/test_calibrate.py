"""`python -m eval calibrate` on a tiny backbone."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from tests.lightning_fixtures import write_texts
from tests.models import save_tiny_backbone

PNG = b"\x89PNG"


def run_eval(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    texts = write_texts(folder / "texts")
    run_eval("calibrate", "--backbone", tiny_backbone, "--out", folder / "out", "--window", "64", "--windows", "2",
             "--sources", json.dumps([{"name": "mine", "path": str(texts)}]))  # fmt: skip
    return folder / "out"


def test_calibrate_tells_the_architecture_and_the_key_site(calibrated: Path) -> None:
    architecture = figures(calibrated / "calibrate.json")["architecture"]
    assert (architecture["layers"], architecture["query_heads"], architecture["kv_heads"]) == (2, 4, 2)
    assert architecture["gates"] == 4
    assert architecture["pre_rope_key"]["module"] == "k_proj"


def test_calibrate_describes_attention_by_layer_and_over_all_heads(calibrated: Path) -> None:
    attention = figures(calibrated / "calibrate.json")["attention"]
    assert len(attention["layers"]) == 2
    for row in [*attention["layers"], attention["all_heads"]]:
        assert set(row["percentiles"]) == {"50", "75", "90", "95", "99", "99.9"}
        assert 0 <= row["min"] <= row["median"] <= row["suggested_threshold"] <= row["max"] <= 1
        assert {"0.05", "0.1"} < set(row["share_above"])


def test_calibrate_shows_that_a_higher_threshold_shortens_lives(calibrated: Path) -> None:
    labels = figures(calibrated / "calibrate.json")["labels"]
    assert list(labels) == ["0.02", "0.05", "0.11"]
    means = [row["mean_log4_lifespan"] for row in labels.values()]
    assert means == sorted(means, reverse=True)


def test_calibrate_leaves_three_pictures(calibrated: Path) -> None:
    pictures = sorted(calibrated.glob("*.png"))
    names = [picture.stem for picture in pictures]
    assert names == ["attention_by_layer", "lifespans_by_head", "lifespans_by_threshold"]
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)


def test_calibrate_prints_the_module_tree_and_the_shape_of_an_attention_map(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "texts", files=1)
    run_eval("calibrate", "--backbone", tiny_backbone, "--out", tmp_path / "out", "--window", "32", "--windows", "1",
             "--sources", json.dumps([{"name": "mine", "path": str(texts)}]))  # fmt: skip
    said = capsys.readouterr().out
    for line in ("(layers): ModuleList(", "(0-1): 2 x", "(k_proj): Linear(in_features=", "(lm_head): Linear("):
        assert line in said
    assert "(batch, query_heads, queries, keys) = (1, 4, 32, 32)" in said
    assert figures(tmp_path / "out/calibrate.json")["architecture"]["attention_map"] == [1, 4, 32, 32]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gpt2"])
def test_calibrate_works_for_every_family(family: str, tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "lm", family)
    texts = write_texts(tmp_path / "texts", files=1)
    run_eval("calibrate", "--backbone", backbone, "--out", tmp_path / "out", "--window", "32", "--windows", "1",
             "--sources", json.dumps([{"name": "mine", "path": str(texts)}]))  # fmt: skip
    assert (tmp_path / "out" / "calibrate.json").exists()
