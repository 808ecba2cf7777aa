"""Row blocks read through memory maps."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.shards.reader import ShardReader

LABELS = ("lifespan", "future_attention")


@pytest.mark.parametrize("layers", [None, [0], [1], [0, 1]])
@pytest.mark.parametrize("name", ["keys", "keys_post_rope", *LABELS, "horizon", "position", "token", "document"])
def test_a_block_read_equals_that_part_of_the_whole_tensor(
    name: str, layers: list[int] | None, shards: Manifest
) -> None:
    reader = ShardReader(shards.folder)
    for block in shards.labelled("train", 5, 4):
        whole = load_file(shards.folder / block.file)[name]
        here = slice(block.start, block.stop)
        part = whole[:, :, here] if name.startswith("keys") else whole[..., here]
        if layers is not None and whole.dim() > 1:
            part = part[:, layers] if name in LABELS else part[layers]
        read = reader.read(block, name, layers)
        assert read.dtype == whole.dtype
        assert torch.equal(read, part)


def test_a_reader_travels_to_another_process_and_reads_on(shards: Manifest) -> None:
    reader, block = ShardReader(shards.folder), shards.labelled("train", 5, 4)[0]
    before = reader.read(block, "keys")
    assert torch.equal(pickle.loads(pickle.dumps(reader)).read(block, "keys"), before)


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_truncated_shard_is_refused_by_name(left: int, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is damaged"):
        ShardReader(shard.parent).read(RowBlock(shard.name, 0, 0, 4), "keys")


def test_a_missing_shard_is_told_as_missing(shard: Path) -> None:
    shard.unlink()
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is missing"):
        ShardReader(shard.parent).read(RowBlock(shard.name, 0, 0, 4), "keys")


def test_a_tensor_that_a_shard_lacks_is_named(shard: Path) -> None:
    with pytest.raises(SmartKVError, match=r"shard\.safetensors has no usable 'keys_post_rope'"):
        ShardReader(shard.parent).read(RowBlock(shard.name, 0, 0, 4), "keys_post_rope")
