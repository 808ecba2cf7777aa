"""Batches of blocks: every row once an epoch for any number of processes, and resumable inside an epoch.

Rows are told apart by position, token and the keys of all heads, read here straight from the shard files.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datamodules.block_loader import BlockLoader, BlockReader, KeyBatch
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest
from tests.lightning_fixtures import FOLLOW_UP, SINKS, WINDOW, labelled

BATCH, BLOCK = 40, 9  # 28 labelled keys a window are cut into 9 + 9 + 9 + 1; 28 blocks, 4 a batch


@pytest.fixture(scope="module")
def rows(tiny_shards: Path) -> LabelledKeys:
    return LabelledKeys(Manifest.read(tiny_shards))


def loader(
    rows: LabelledKeys,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = 0,
    epoch: int = 0,
    batch_size: int = BATCH,
    num_workers: int = 0,
) -> BlockLoader:
    blocks = rows.blocks("train", BLOCK)
    made = BlockLoader(BlockReader(rows), blocks, batch_size, seed, rank, world_size, num_workers)
    made.set_epoch(epoch)
    return made


def content(position: torch.Tensor, token: torch.Tensor, keys: torch.Tensor, target: torch.Tensor) -> Counter[Any]:
    """Each row with everything that belongs to it."""
    bits = keys.view(torch.int16).transpose(0, 1).flatten(1).tolist()
    targets = target.T.double().mul(1e4).round().tolist()
    return Counter(zip(position.tolist(), token.tolist(), map(tuple, bits), map(tuple, targets), strict=True))


def of_batch(batch: KeyBatch) -> Counter[Any]:
    return content(batch.position, batch.token, batch.keys, batch.target)


def union(batches: Iterable[KeyBatch]) -> Counter[Any]:
    return sum((of_batch(batch) for batch in batches), Counter())


def equal(a: KeyBatch, b: KeyBatch) -> bool:
    return a.global_rows == b.global_rows and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("keys", "target", "position", "token")
    )


# -- an epoch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_labelled_row_is_seen_exactly_once_an_epoch(
    tiny_shards: Path, rows: LabelledKeys, world_size: int
) -> None:
    seen = sum((union(loader(rows, rank, world_size)) for rank in range(world_size)), Counter())
    truth = labelled(tiny_shards, "train")
    assert seen == content(truth["position"], truth["token"], truth["keys"], truth["target"])


def test_there_are_as_many_labelled_rows_as_the_definition_says(tiny_shards: Path) -> None:
    truth = labelled(tiny_shards, "train")
    assert truth["keys"].shape[1] == 7 * (WINDOW - FOLLOW_UP - SINKS)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_step_s_rows_do_not_depend_on_the_number_of_processes(rows: LabelledKeys, world_size: int) -> None:
    alone = [of_batch(batch) for batch in loader(rows)]
    ranks = [list(loader(rows, rank, world_size)) for rank in range(world_size)]
    assert [union(parts) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_global_rows_counts_the_rows_of_all_processes(rows: LabelledKeys, world_size: int) -> None:
    ranks = [list(loader(rows, rank, world_size)) for rank in range(world_size)]
    for parts in zip(*ranks, strict=True):
        assert {part.global_rows for part in parts} == {sum(part.keys.shape[1] for part in parts)}


def test_the_length_is_the_number_of_batches(rows: LabelledKeys) -> None:
    batches = loader(rows)
    assert len(batches) == len(list(batches)) == 7


def test_no_batch_is_larger_than_asked_for(rows: LabelledKeys) -> None:
    assert max(batch.keys.shape[1] for batch in loader(rows)) <= BATCH


def test_two_epochs_have_different_orders(rows: LabelledKeys) -> None:
    first, second = list(loader(rows, epoch=0)), list(loader(rows, epoch=1))
    assert not all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_epoch_sees_the_same_rows(rows: LabelledKeys) -> None:
    assert union(loader(rows, epoch=0)) == union(loader(rows, epoch=1))


def test_the_same_seed_and_epoch_give_the_same_order(rows: LabelledKeys) -> None:
    pairs = zip(loader(rows, seed=3, epoch=2), loader(rows, seed=3, epoch=2), strict=True)
    assert all(equal(a, b) for a, b in pairs)


def test_another_seed_gives_another_order(rows: LabelledKeys) -> None:
    assert not all(equal(a, b) for a, b in zip(loader(rows, seed=3), loader(rows, seed=4), strict=True))


def test_without_a_seed_rows_come_in_the_order_of_the_shards(tiny_shards: Path, rows: LabelledKeys) -> None:
    position = torch.cat([batch.position for batch in loader(rows, seed=None)])
    assert torch.equal(position, labelled(tiny_shards, "train")["position"])


def test_a_second_pass_starts_anew(rows: LabelledKeys) -> None:
    batches = loader(rows)
    assert union(batches) == union(batches)


def test_reader_processes_yield_the_same_batches(rows: LabelledKeys) -> None:
    assert all(equal(a, b) for a, b in zip(loader(rows), loader(rows, num_workers=1), strict=True))


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, 4, 6])
def test_resuming_inside_an_epoch_yields_exactly_the_remaining_batches(rows: LabelledKeys, done: int) -> None:
    first = loader(rows, epoch=1)
    iterator = iter(first)
    for _ in range(done):
        next(iterator)
    resumed = loader(rows)
    resumed.load_state_dict(first.state_dict())
    assert all(equal(a, b) for a, b in zip(iterator, resumed, strict=True))


def test_after_a_resumed_epoch_the_next_one_is_whole(rows: LabelledKeys) -> None:
    resumed = loader(rows)
    resumed.load_state_dict({"epoch": 0, "consumed": 5})
    assert len(list(resumed)) == 2
    resumed.set_epoch(1)
    assert union(resumed) == union(loader(rows, epoch=1))


def test_resuming_at_the_end_of_an_epoch_starts_the_next_one(rows: LabelledKeys) -> None:
    resumed = loader(rows)
    resumed.load_state_dict({"epoch": 0, "consumed": 7})
    resumed.set_epoch(1)
    assert all(equal(a, b) for a, b in zip(loader(rows, epoch=1), resumed, strict=True))


# -- one batch --------------------------------------------------------------------------------------------------------


def test_a_process_without_rows_gets_an_empty_batch_of_the_right_shapes(rows: LabelledKeys) -> None:
    first, second = (next(iter(loader(rows, rank, 2, batch_size=BLOCK))) for rank in (0, 1))
    assert first.keys.shape[1] == second.global_rows > 0
    assert second.keys.shape == (4, 0, 8) and second.keys.dtype == torch.float16
    assert second.target.shape == (4, 0) and second.target.dtype == torch.float32
    assert second.position.shape == second.token.shape == (0,)


def test_reading_a_batch_gives_the_asked_slice_of_each_shard(tiny_shards: Path, rows: LabelledKeys) -> None:
    blocks = rows.blocks("train", BLOCK)
    chosen = [blocks[5], blocks[-2], blocks[0]]
    batch = BlockReader(rows)[chosen, 99]
    shards = [load_file(tiny_shards / block.file) for block in chosen]
    here = [slice(block.start, block.stop) for block in chosen]
    keys = [shard["keys"][:, :, at].flatten(0, 1) for shard, at in zip(shards, here, strict=True)]
    tokens = [shard["token"][at] for shard, at in zip(shards, here, strict=True)]
    assert torch.equal(batch.keys, torch.cat(keys, dim=1))
    assert torch.equal(batch.token, torch.cat(tokens))
