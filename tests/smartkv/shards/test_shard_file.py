"""The bytes and the header of a shard file, and damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.shards.shard_file import DamagedFile, digests, open_tensors, read_header, write_shard
from tests.models import llama, shard_tensors, token_ids
from tests.smartkv.shards.fixtures import METADATA

# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_shard_gives_back_its_tensors_bit_for_bit_and_its_metadata(tmp_path: Path) -> None:
    tensors = shard_tensors(ages=2, post_rope=True)
    tensors["future_attention"][0, 0, 0, -3:] = torch.nan
    write_shard(tmp_path / "new" / "shard.safetensors", tensors, METADATA)
    back = load_file(tmp_path / "new" / "shard.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()
    assert read_header(tmp_path / "new" / "shard.safetensors") == METADATA


def test_equal_content_gives_equal_bytes_in_any_order_of_keys(tmp_path: Path) -> None:
    tensors = shard_tensors(ages=1, post_rope=True)
    turned = {name: tensors[name].clone() for name in reversed(tensors)}
    turned["keys"] = turned["keys"].transpose(2, 3).contiguous().transpose(2, 3)  # equal, but laid out otherwise
    write_shard(tmp_path / "a", tensors, METADATA)
    write_shard(tmp_path / "b", turned, dict(reversed(METADATA.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_equal_content_gives_equal_bytes_in_another_process(tmp_path: Path, fresh_interpreter: dict[str, Any]) -> None:
    write_shard(tmp_path / "here", shard_tensors(ages=1, post_rope=True), METADATA)
    assert (tmp_path / "here").read_bytes() == fresh_interpreter["shard"]


def test_what_a_window_gives_fits_the_shards_contract() -> None:
    labels = label_window(llama(), token_ids(16), LabelSpec((0.05, 0.1), (1,), 4), post_rope=True)
    contract = shard_tensors(windows=1, thresholds=2, ages=1, post_rope=True, head_dim=8)
    for name in ("keys", "keys_post_rope", "lifespan", "horizon", "future_attention"):
        tensor = getattr(labels, name)
        assert (tensor.dtype, tensor.shape) == (contract[name].dtype, contract[name].shape), name
    assert torch.equal(labels.horizon, contract["horizon"])


def test_a_file_of_an_early_version_has_no_digest(shard: Path) -> None:
    save_file(load_file(shard), shard, metadata={"smartkv": json.dumps(METADATA)})
    written, content = digests(shard)
    assert written is None and len(content) == 64
    assert read_header(shard) == METADATA


def test_the_digest_of_a_whole_file_is_that_of_its_content(shard: Path) -> None:
    written, content = digests(shard)
    assert written == content and written is not None


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_truncated_shard_is_refused_by_name(left: int, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is damaged"):
        read_header(shard)


def test_a_flipped_bit_anywhere_is_found(shard: Path) -> None:
    write_shard(shard, shard_tensors(), {"thresholds": [0.05], "window": 16})
    whole = shard.read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        shard.write_bytes(data)
        try:
            written, content = digests(shard)
            assert written != content, place
        except SmartKVError:
            pass


def test_a_missing_shard_is_told_as_missing(shard: Path) -> None:
    shard.unlink()
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is missing"):
        read_header(shard)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"smartkv": "{"}, {"smartkv": "[]"}])
def test_a_safetensors_file_of_others_is_refused(metadata: dict[str, str] | None, shard: Path) -> None:
    save_file({"keys": torch.zeros(1)}, shard, metadata=metadata)
    for read in (read_header, digests):
        with pytest.raises(SmartKVError, match=r"shard\.safetensors is .* not one that SmartKV wrote"):
            read(shard)


def test_a_damaged_file_is_told_apart_from_a_missing_one(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedFile):
        open_tensors(shard)
    shard.unlink()
    with pytest.raises(SmartKVError) as error:
        open_tensors(shard)
    assert not isinstance(error.value, DamagedFile)
