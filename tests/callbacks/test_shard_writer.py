"""Shards and manifest on disk as a harvest goes on, and what is printed of them."""

from pathlib import Path

import pytest

from smartkv import Manifest
from smartkv.shards.manifest import MANIFEST
from tests.lightning_fixtures import harvest, harvest_config_at, run_cli


def test_a_manifest_is_announced_with_its_size(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = harvest(tmp_path / "shards", tiny_backbone, tiny_texts, windows={"train": 2, "validation": 1})
    assert f"2 shards with 192 tokens of 4 heads in {out}" in capsys.readouterr().out


def test_a_run_that_is_cut_short_leaves_its_shards_and_no_manifest(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    config = harvest_config_at(out, tiny_backbone, tiny_texts, windows={"train": 4, "validation": 1})
    run_cli("predict", "-c", config, "--trainer.limit_predict_batches", "1")
    assert [path.name for path in out.glob("*-*.safetensors")] == ["train-00000.safetensors"]
    assert not (out / MANIFEST).exists()
    assert f"2 shards are not in {out}, so there is no manifest yet" in capsys.readouterr().out
    run_cli("predict", "-c", config)
    assert len(Manifest.read(out).shards) == 3
