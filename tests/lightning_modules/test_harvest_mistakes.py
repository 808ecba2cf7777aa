"""Mistakes in a harvest: told in one line, and nothing that was harvested is lost."""

from pathlib import Path
from typing import Any

import pytest

from smartkv import SmartKVError
from smartkv.shards.manifest import MANIFEST
from tests.lightning_fixtures import (
    error_line,
    harvest_by_trainer,
    harvest_config_at,
    refused,
    shard_bytes,
)
from tests.models import save_tiny_backbone

ONE = {"train": 1, "validation": 0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"thresholds": [0.02, 0.1]}}, "thresholds"),
        ({"model": {"ages": [4]}}, r"ages \[8\], now \[4\]"),
        ({"model": {"follow_up": 16}}, "follow_up"),
        ({"model": {"post_rope": True}}, "post_rope False, now True"),
        ({"model": {"dtype": "bfloat16"}}, "dtype float32, now bfloat16"),
        ({"windows": {"train": 8, "validation": 3}}, "counts"),
        ({"data": {"seed": 1}}, "seed"),
    ],
    ids=["thresholds", "ages", "follow_up", "post_rope", "dtype", "windows", "seed"],
)
def test_other_settings_into_the_same_folder_are_refused_naming_what_differs(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(SmartKVError, match=f"differs in {named}"):
        harvest_by_trainer(copied, tiny_backbone, tiny_texts, **change)
    assert shard_bytes(copied) == shard_bytes(tiny_shards)


def test_other_settings_are_refused_while_some_shards_are_missing(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "train-00002.safetensors").unlink()
    config = harvest_config_at(copied, tiny_backbone, tiny_texts, model={"thresholds": [0.02, 0.1]})
    assert "differs in thresholds" in error_line(refused(capsys, "predict", "-c", config))
    assert not (copied / "train-00002.safetensors").exists()


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path, tiny_texts: Path) -> None:
    backbone, out = save_tiny_backbone(tmp_path / "backbone"), tmp_path / "out"
    harvest_by_trainer(out, backbone, tiny_texts, windows={"train": 2, "validation": 0})
    before = shard_bytes(out)
    save_tiny_backbone(backbone, seed=1)
    with pytest.raises(SmartKVError, match="differs in fingerprint"):
        harvest_by_trainer(out, backbone, tiny_texts, windows={"train": 2, "validation": 0})
    assert shard_bytes(out) == before


def test_model_and_data_with_different_backbones_are_refused(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    other = save_tiny_backbone(tmp_path / "other")
    with pytest.raises(SmartKVError, match=f"model.backbone is '{tiny_backbone}', data.backbone '{other}'"):
        harvest_by_trainer(tmp_path / "out", tiny_backbone, tiny_texts, data={"backbone": str(other)})


def test_a_window_longer_than_the_model_s_positions_stops_with_one_line(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config_at(tmp_path / "out", tiny_backbone, tiny_texts, windows=ONE, data={"window": 513})
    said = error_line(refused(capsys, "predict", "-c", config))
    assert "513" in said and "512 positions" in said


def test_a_window_longer_than_the_model_s_positions_costs_nothing_that_was_harvested(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    with pytest.raises(SmartKVError):
        harvest_by_trainer(copied, tiny_backbone, tiny_texts, data={"window": 513})
    assert shard_bytes(copied) == shard_bytes(tiny_shards)
    assert (copied / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


def test_a_refused_harvest_does_not_stand_in_the_way_of_the_corrected_one(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SmartKVError):
        harvest_by_trainer(out, tiny_backbone, tiny_texts, data={"window": 36})
    harvest_by_trainer(out, tiny_backbone, tiny_texts)
    assert (out / MANIFEST).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"follow_up": 60}}, "follow_up 60 leaves no key of a window of 64 tokens"),
        ({"model": {"thresholds": [5.0]}}, "thresholds must be attention probabilities between 0 and 1"),
        ({"model": {"dtype": "float8"}}, "dtype 'float8' is unknown: expected auto, float32"),
        ({"model": {"threads": 0}}, "threads at least 1"),
        ({"model": {"sinks": -1}}, "sinks must be at least 0"),
    ],
    ids=["follow_up", "thresholds", "dtype", "threads", "sinks"],
)
def test_a_setting_that_makes_no_sense_is_refused(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(SmartKVError, match=said):
        harvest_by_trainer(tmp_path / "out", tiny_backbone, tiny_texts, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"follow_up": 60}}, "follow_up 60 leaves no key"),
        ({"model": {"thresholds": [5.0]}}, "thresholds must be attention probabilities"),
        ({"model": {"dtype": "float8"}}, "dtype 'float8' is unknown"),
        ({"model": {"threads": 0}}, "threads at least 1"),
        ({"model": {"backbone": "gone"}}, "model.backbone is 'gone', data.backbone"),
        ({"data": {"window": 513}}, "513"),
        ({"trainer": {"precision": "bf16-true"}}, "trainer.precision must be 32-true"),
        ({"trainer": {"limit_predict_batches": 0}}, "trainer.limit_predict_batches is 0, so nothing would be harvest"),
    ],
    ids=["follow_up", "thresholds", "dtype", "threads", "backbone", "window", "precision", "limit"],
)
def test_a_mistake_costs_no_shard_when_it_comes_with_overwrite(
    copied: Path,
    tiny_backbone: Path,
    tiny_texts: Path,
    tiny_shards: Path,
    change: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = harvest_config_at(copied, tiny_backbone, tiny_texts, **change)
    assert said in error_line(refused(capsys, "predict", "-c", config, "--overwrite"))
    assert shard_bytes(copied) == shard_bytes(tiny_shards)
    assert (copied / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


def test_a_model_that_cannot_be_had_stops_with_one_line(
    tmp_path: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config_at(tmp_path / "out", tmp_path / "gone", tiny_texts)
    assert f"'{tmp_path / 'gone'}'" in error_line(refused(capsys, "predict", "-c", config))


def test_texts_that_cannot_be_had_stop_with_one_line(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config_at(tmp_path / "out", tiny_backbone, tmp_path / "gone")
    assert f"path {tmp_path / 'gone'} does not exist" in error_line(refused(capsys, "predict", "-c", config))


def test_a_misspelt_setting_is_named(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config_at(tmp_path / "out", tiny_backbone, tiny_texts, model={"folow_up": 16})
    assert "folow_up" in refused(capsys, "predict", "-c", config, status=None)


@pytest.mark.parametrize("value", [False, 3, []])
def test_one_value_where_there_are_several_settings_is_refused(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    config = harvest_config_at(tmp_path / "out", tiny_backbone, tiny_texts, data={"windows": value})
    said = error_line(refused(capsys, "predict", "-c", config))
    assert f"data.windows must have keys of its own (train, validation, test), not be {value}" in said
