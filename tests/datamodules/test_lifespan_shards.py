"""Keys and labels of harvested shards: what a batch holds, and which settings and checkpoints are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datamodules.lifespan_shards import LifespanShards
from smartkv.errors import SmartKVError
from smartkv.shards.manifest import Manifest
from tests.lightning_fixtures import SINKS, WINDOW
from tests.models import write_tiny_shards

BATCH, BLOCK = 40, 9  # 28 labelled keys a window are cut into 9 + 9 + 9 + 1; 28 blocks, 4 a batch


def ready(shards: Path, **settings: Any) -> LifespanShards:
    data = LifespanShards(str(shards), **{"batch_size": BATCH} | settings)
    data.trainer = None
    data.setup("fit")
    return data


@pytest.mark.parametrize(
    "other", [{"batch_size": BATCH + 1}, {"threshold": 0.02}, {"follow_up": 9}, {"layers": "0"}, {"seed": 1}]
)
def test_a_checkpoint_of_other_data_is_refused(tiny_shards: Path, other: dict[str, Any]) -> None:
    state = ready(tiny_shards).state_dict()
    ready(tiny_shards).load_state_dict(state)
    with pytest.raises(SmartKVError, match="the same rows cannot follow"):
        ready(tiny_shards, **other).load_state_dict(state)


def test_a_checkpoint_of_another_harvest_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    thresholds = tuple(Manifest.read(tiny_shards).spec.thresholds)
    others = [
        write_tiny_shards(tmp_path / name, thresholds=thresholds, window=window)
        for name, window in (("a", 16), ("b", 17))
    ]
    states = [ready(manifest.folder).state_dict() for manifest in others]
    assert {**states[0], "shards": ""} == {**states[1], "shards": ""}
    with pytest.raises(SmartKVError, match="the same rows cannot follow"):
        ready(others[1].folder).load_state_dict(states[0])


# -- one batch --------------------------------------------------------------------------------------------------------


def test_targets_are_log4_of_the_threshold_s_lifespan_capped_at_the_follow_up(tiny_shards: Path) -> None:
    data = LifespanShards(str(tiny_shards), threshold=0.02, follow_up=16, batch_size=10_000, block=64)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    lifespans = []
    for entry in data.rows.manifest.of_split("validation"):
        shard = load_file(tiny_shards / entry.file)
        chosen = (shard["horizon"] >= 16) & (shard["position"] >= SINKS)
        lifespans.append(shard["lifespan"][0][:, :, chosen].flatten(0, 1))
    lifespan = torch.cat(lifespans, dim=1)
    assert lifespan.max() > 16
    torch.testing.assert_close(4.0**batch.target, lifespan.clamp(max=16).float())


def test_layers_choose_the_gates_of_a_batch(tiny_shards: Path) -> None:
    batch, both = (
        next(iter(ready(tiny_shards, layers=layers, block=BLOCK).train_dataloader())) for layers in ("1-1", None)
    )
    assert torch.equal(batch.keys, both.keys[2:])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": "1-7"}, "asks for 1-7, but the model has layers 0-1"),
        ({"layers": "first"}, "'first' is no list of ranges"),
        ({"threshold": 0.3}, r"threshold 0.3 was not harvested .* it holds 0.02, 0.05"),
        ({"follow_up": WINDOW - SINKS}, "follow_up 60 leaves no key of a window of 64 tokens"),
        ({"follow_up": 0}, "follow_up 0"),
        ({"batch_size": 0}, "batch_size and block must be at least 1"),
        ({"block": 0}, "batch_size and block must be at least 1"),
    ],
)
def test_a_setting_that_the_shards_cannot_serve_is_refused(tiny_shards: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SmartKVError, match=said):
        LifespanShards(str(tiny_shards), **wrong).setup("fit")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=str(tmp_path / "gone")):
        LifespanShards(str(tmp_path / "gone")).setup("fit")


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_shards_without_a_split_are_refused_before_training(tmp_path: Path, missing: str) -> None:
    there = "validation" if missing == "train" else "train"
    write_tiny_shards(tmp_path, splits=[(there, 2)])
    with pytest.raises(SmartKVError, match=f"has no {missing} windows"):
        LifespanShards(str(tmp_path)).setup("fit")


def test_keys_post_rope_that_were_not_harvested_are_refused(tiny_shards: Path) -> None:
    with pytest.raises(SmartKVError, match="keys_post_rope"):
        data = LifespanShards(str(tiny_shards), inputs="keys_post_rope")
        data.setup("fit")
        next(iter(data.train_dataloader()))
