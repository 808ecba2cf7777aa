"""Labelled keys and their targets, read from shards for some layers and one threshold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import WindowLabels
from smartkv.shards.in_memory import InMemoryRows
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.shards.shard_file import write_shard
from tests.models import write_tiny_shards


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Windows of 16 tokens with 2 sinks and a follow-up of 4: two for training."""
    return write_tiny_shards(tmp_path / "shards", splits=[("train", 2)], ages=(2, 5), post_rope=True)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("inputs", ["keys", "keys_post_rope"])
@pytest.mark.parametrize(("layers", "gates"), [(None, [0, 1, 2, 3]), ("0", [0, 1]), ("1", [2, 3])])
@pytest.mark.parametrize(("threshold", "row"), [(0.05, 0), (0.1, 1)])
def test_rows_are_the_labelled_tokens_of_the_layers_and_threshold_asked_for(
    threshold: float, row: int, layers: str | None, gates: list[int], inputs: str, size: int | None, shards: Manifest
) -> None:
    rows = LabelledKeys(shards, threshold, inputs=inputs, layers=layers)
    whole = load_file(shards.folder / shards.shards[0].file)
    tokens = [t for t in range(32) if 2 <= t % 16 < 12]
    blocks = rows.blocks("train", size)
    assert rows.gates == len(gates)
    assert torch.equal(rows.keys(*blocks), whole[inputs].flatten(0, 1)[gates][:, tokens])
    lifespan = whole["lifespan"][row].flatten(0, 1)[gates][:, tokens].clamp(max=4)
    labels = rows.labels(*blocks)
    torch.testing.assert_close(labels.log4_lifespan, lifespan.log() / torch.tensor(4.0).log())
    assert labels.ages == shards.spec.ages and len(labels.ages) > 0
    assert torch.equal(labels.future_attention, whole["future_attention"].flatten(1, 2)[:, gates][..., tokens])
    for name, read in (("position", rows.position), ("token", rows.token)):
        assert torch.equal(read(*blocks), whole[name][tokens])


def test_what_is_read_may_be_written_to(shards: Manifest) -> None:
    rows = LabelledKeys(shards)
    block = rows.blocks("train")[0]
    for read in (rows.keys, rows.target, rows.position, rows.token, rows.document):
        before = read(block).clone()
        read(block).add_(7)
        assert torch.equal(read(block), before)


def test_a_block_without_rows_reads_as_none_of_each(shards: Manifest) -> None:
    rows = LabelledKeys(shards)
    labels, block = rows.labels(RowBlock(shards.shards[0].file, 0, 0, 0)), RowBlock(shards.shards[0].file, 0, 0, 0)
    assert rows.keys(block).shape == (4, 0, shards.fingerprint.head_dim)
    assert labels.log4_lifespan.shape == (4, 0)
    assert labels.future_attention.shape == (len(shards.spec.ages), 4, 0)


def test_another_follow_up_moves_the_rows_and_the_cap(shards: Manifest) -> None:
    rows = LabelledKeys(shards, follow_up=10)
    first = rows.blocks("train")[0]
    assert (first.start, first.stop) == (2, 6)
    lifespan = load_file(shards.folder / first.file)["lifespan"][0].flatten(0, 1)[:, 2:6].clamp(max=10)
    assert lifespan.max() > 4
    torch.testing.assert_close(rows.target(first), lifespan.log() / torch.tensor(4.0).log())


@pytest.mark.parametrize("follow_up", [0, 14, 99])
def test_a_follow_up_that_leaves_no_key_is_refused_with_the_limit(follow_up: int, shards: Manifest) -> None:
    assert LabelledKeys(shards, follow_up=13).blocks("train")
    with pytest.raises(SmartKVError, match=rf"follow_up {follow_up} .* less than 14"):
        LabelledKeys(shards, follow_up=follow_up)


def test_a_follow_up_of_1_token_is_the_shortest(shards: Manifest) -> None:
    assert LabelledKeys(shards, follow_up=1).blocks("train")[0].stop == 15


def test_labels_of_shards_without_ages_are_lifespans_alone(tmp_path: Path) -> None:
    rows = LabelledKeys(write_tiny_shards(tmp_path))
    blocks = rows.blocks("train")
    labels = rows.labels(*blocks)
    assert torch.equal(labels.log4_lifespan, rows.target(*blocks))
    assert labels.future_attention is None and labels.ages == ()


def test_keys_are_read_from_memory_where_they_are_given_so(shards: Manifest) -> None:
    want, memory = LabelledKeys(shards), InMemoryRows(shards.fingerprint, shards.spec)
    block = want.blocks("train", 5)[0]
    whole = load_file(shards.folder / block.file)
    names = ("keys", "lifespan", "horizon", "future_attention", "keys_post_rope")
    memory.hold([block], WindowLabels(**{name: whole[name] for name in names}), whole["token"])
    expected = want.keys(block)
    (shards.folder / block.file).unlink()
    assert torch.equal(LabelledKeys(shards, reader=memory).keys(block), expected)


def test_unknown_inputs_are_refused_with_those_known(shards: Manifest) -> None:
    with pytest.raises(SmartKVError, match=r"'values'.*keys or keys_post_rope"):
        LabelledKeys(shards, inputs="values")


def test_a_threshold_that_was_not_harvested_is_refused(shards: Manifest) -> None:
    with pytest.raises(SmartKVError, match=r"threshold 0\.3"):
        LabelledKeys(shards, threshold=0.3)


def test_inputs_that_were_not_harvested_are_refused_by_name(tmp_path: Path) -> None:
    rows = LabelledKeys(write_tiny_shards(tmp_path), inputs="keys_post_rope")
    with pytest.raises(SmartKVError, match="no usable 'keys_post_rope'"):
        rows.keys(rows.blocks("train")[0])


def test_a_split_without_windows_is_refused_by_name(shards: Manifest) -> None:
    with pytest.raises(SmartKVError, match="no test windows"):
        LabelledKeys(shards).blocks("test")


def with_keys(shards: Manifest, values: list[float]) -> LabelledKeys:
    """The rows after some keys were overwritten on disk."""
    path = shards.folder / shards.shards[0].file
    tensors = load_file(path)
    tensors["keys"][1, 1, 5, : len(values)] = torch.tensor(values)
    write_shard(path, tensors, {})
    return LabelledKeys(shards)


@pytest.mark.parametrize("values", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_keys_that_are_not_finite_are_refused_naming_the_file(values: list[float], shards: Manifest) -> None:
    rows = with_keys(shards, values)
    with pytest.raises(SmartKVError, match=rf"{shards.shards[0].file} holds keys that are NaN"):
        rows.checked_keys(rows.blocks("train")[0])


def test_the_largest_keys_that_float16_holds_are_let_through(shards: Manifest) -> None:
    rows = with_keys(shards, [65504.0, 65504.0, 65504.0])
    block = rows.blocks("train")[0]
    assert torch.equal(rows.checked_keys(block), rows.keys(block))
    assert rows.keys(block).max() == 65504
