"""Keys and targets exported to one folder per head."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import Manifest
from smartkv.shards.per_head_export import export_heads
from tests.models import write_tiny_shards


@pytest.mark.parametrize("threshold", [0.05, 0.1])
def test_export_writes_the_labelled_rows_of_each_head(threshold: float, shards: Manifest, tmp_path: Path) -> None:
    assert export_heads(shards, tmp_path / "heads", threshold) == 8
    for number, entry in enumerate(shards.of_split("train")):
        whole = load_file(shards.folder / entry.file)
        rows = [t for t in range(entry.tokens) if 2 <= t % 16 < 12]  # window 16, sinks 2, follow-up 4
        for layer in range(2):
            for head in range(2):
                file = load_file(tmp_path / "heads" / f"l{layer}_h{head}" / f"shard_{number}.safetensors")
                lifespan = whole["lifespan"][shards.threshold_index(threshold), layer, head, rows]
                target = torch.tensor([min(life, 4) for life in lifespan.tolist()]).log() / torch.tensor(4.0).log()
                assert file["keys"].dtype == torch.float16
                assert torch.equal(file["keys"], whole["keys"][layer, head, rows])
                torch.testing.assert_close(file["target"], target)


def test_export_says_when_the_follow_up_leaves_no_key(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path / "shards", follow_up=14)  # window 16, sinks 2
    with pytest.raises(SmartKVError):
        export_heads(shards, tmp_path / "heads", 0.05)
