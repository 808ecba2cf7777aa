"""Row blocks in memory against the same rows read from shards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, WindowLabels
from smartkv.shards.in_memory import InMemoryRows
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.shards.reader import ShardReader
from tests.models import write_tiny_shards

NAMES = ("keys", "keys_post_rope", "lifespan", "future_attention", "position", "token")


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Three shards of one window of 16 tokens each."""
    return write_tiny_shards(tmp_path / "shards", splits=[("train", 1)] * 3, ages=(1, 4), post_rope=True)


def window_of(shards: Manifest, number: int) -> tuple[str, WindowLabels, Tensor]:
    """File, labels and token ids of a shard's only window."""
    file = shards.shards[number].file
    whole = load_file(shards.folder / file)
    names = ("keys", "lifespan", "horizon", "future_attention", "keys_post_rope")
    return file, WindowLabels(**{name: whole[name] for name in names}), whole["token"]


def filled(shards: Manifest, size: int = 5) -> tuple[InMemoryRows, list[RowBlock]]:
    """All labelled row blocks of all windows, in memory."""
    rows = InMemoryRows(shards.fingerprint, shards.spec)
    blocks = shards.labelled("train", size, 4)
    for number in range(len(shards.shards)):
        file, labels, tokens = window_of(shards, number)
        rows.hold([block for block in blocks if block.file == file], labels, tokens)
    return rows, blocks


@pytest.mark.parametrize("layers", [None, [1], [0, 1]])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_block_reads_as_from_its_shard(name: str, layers: list[int] | None, shards: Manifest) -> None:
    rows, blocks = filled(shards)
    reader = ShardReader(shards.folder)
    assert len(rows) == len(blocks) == 6
    for block in blocks:
        want, got = reader.read(block, name, layers), rows.read(block, name, layers)
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_row_block_reads_as_those_rows(name: str, shards: Manifest) -> None:
    rows, blocks = filled(shards, size=10)
    for block in blocks:
        for start, stop in ((block.start, block.stop - 3), (block.start + 2, block.stop), (block.start + 1, 7)):
            part = RowBlock(block.file, 0, start, stop)
            assert torch.equal(rows.read(part, name), ShardReader(shards.folder).read(part, name))


def test_what_is_kept_does_not_change_with_the_window_it_came_from(shards: Manifest) -> None:
    rows = InMemoryRows(shards.fingerprint, shards.spec)
    file, labels, tokens = window_of(shards, 0)
    block = RowBlock(file, 0, 2, 7)
    rows.hold([block], labels, tokens)
    before = rows.read(block, "keys").clone()
    labels.keys.zero_()
    assert before.abs().max() > 0 and torch.equal(rows.read(block, "keys"), before)


def test_the_rest_of_the_window_takes_no_memory(shards: Manifest) -> None:
    rows, blocks = filled(shards)
    for name in NAMES:
        tensor = rows.read(blocks[0], name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_an_empty_row_block_reads_as_no_rows_of_each_tensor(shards: Manifest) -> None:
    rows, empty = InMemoryRows(shards.fingerprint, shards.spec), RowBlock(shards.shards[0].file, 0, 0, 0)
    reader = ShardReader(shards.folder)
    for name in NAMES:
        want, got = reader.read(empty, name), rows.read(empty, name)
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name


def test_a_dropped_row_block_is_gone_and_the_others_stay(shards: Manifest) -> None:
    rows, blocks = filled(shards)
    rows.drop(blocks[0])
    assert len(rows) == 5 and blocks[0] not in rows and all(block in rows for block in blocks[1:])
    with pytest.raises(SmartKVError, match=r"\[2, 7\) has no 'keys' in memory"):
        rows.read(blocks[0], "keys")


@pytest.mark.parametrize("name", ["keys_post_rope", "future_attention"])
def test_a_tensor_that_the_window_lacked_is_named(name: str, shards: Manifest) -> None:
    file, labels, tokens = window_of(shards, 0)
    rows, block = InMemoryRows(shards.fingerprint, LabelSpec()), RowBlock(file, 0, 2, 7)
    rows.hold([block], replace(labels, **{name: None}), tokens)
    assert len(rows.read(block, "token")) == 5
    with pytest.raises(SmartKVError, match=f"has no '{name}' in memory"):
        rows.read(block, name)


def test_rows_across_two_row_blocks_are_not_in_memory(shards: Manifest) -> None:
    rows, blocks = filled(shards)
    across = RowBlock(blocks[0].file, 0, blocks[0].start, blocks[1].stop)
    with pytest.raises(SmartKVError, match="in memory"):
        rows.read(across, "token")
