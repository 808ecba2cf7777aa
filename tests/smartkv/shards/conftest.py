"""A folder of shards and a single shard, for the tests of this folder."""

from pathlib import Path

import pytest

from smartkv.shards.manifest import Manifest
from smartkv.shards.shard_file import write_shard
from tests.models import shard_tensors, write_tiny_shards
from tests.smartkv.shards.fixtures import METADATA


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Two train shards (2 windows and 1) and one of validation (3), with everything a shard may hold."""
    return write_tiny_shards(tmp_path / "shards", ages=(1, 4), post_rope=True)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """One shard, without optional tensors."""
    write_shard(tmp_path / "shard.safetensors", shard_tensors(), METADATA)
    return tmp_path / "shard.safetensors"
