"""Trainings of gates on random keys: the shards, and that both ways are timed on the same steps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eval.speed.gate_fits import SIZES, both_ways, made_shards
from smartkv.shards.manifest import Manifest


def test_made_shards_are_read_as_harvested_ones_are(tmp_path: Path) -> None:
    manifest = Manifest.read(made_shards(tmp_path, *SIZES["Qwen2.5-0.5B"], 64, 4))
    assert [entry.split for entry in manifest.shards] == ["train"] * 4 + ["validation"]
    manifest.verify(manifest.shards)
    shard = load_file(tmp_path / manifest.shards[0].file)
    assert shard["keys"].shape == (24, 2, 64, 64) and 1 <= int(shard["lifespan"].min()) <= int(shard["lifespan"].max())
    assert torch.equal(shard["horizon"], torch.arange(63, -1, -1))


def test_both_ways_take_the_same_steps_in_turns(tmp_path: Path) -> None:
    figures = both_ways(tmp_path, 28, 2, 2, 64, 4, 1, "cpu")
    rounds = figures["rounds"]
    assert len(rounds["together"]) == len(rounds["apart"]) == 2
    ratios = sorted(one / all_ for one, all_ in zip(rounds["apart"], rounds["together"], strict=True))
    assert figures["ratio"] == pytest.approx(sum(ratios) / 2)
    assert figures["rows_a_step"] == 28
