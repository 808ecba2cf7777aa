"""Shards and their manifest on disk."""

import hashlib
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.architecture import Fingerprint
from smartkv.shards.manifest import Manifest, RowBlock, ShardEntry, shard_entry
from smartkv.shards.per_head_export import export_heads
from smartkv.shards.reader import ShardReader
from smartkv.shards.shard_file import digests, read_header, write_shard
from tests.harm import full_disk
from tests.models import llama, shard_tensors, token_ids, write_tiny_shards

METADATA = {"b": 1, "a": [2, "é"], "c": {"y": 0, "x": None}}
quick = settings(deadline=None, max_examples=30, derandomize=True)


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Two train shards (2 windows and 1) and one of validation (3), with everything a shard may hold."""
    return write_tiny_shards(tmp_path / "shards", ages=(1, 4), post_rope=True)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """One shard."""
    write_shard(tmp_path / "shard.safetensors", shard_tensors(), METADATA)
    return tmp_path / "shard.safetensors"


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest again with other values; ... takes a key out."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


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
        ours = getattr(labels, name)
        assert (ours.dtype, ours.shape) == (contract[name].dtype, contract[name].shape), name
    assert torch.equal(labels.horizon, contract["horizon"])


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_file_in_place_of_the_folder_is_an_error_that_names_the_target(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(SmartKVError, match=r"out/shard"):
        write_atomically(tmp_path / "out" / "shard", b"x")
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(SmartKVError, match="could not be written"):
        write_atomically(tmp_path / "shard", b"x")
    assert os.listdir(tmp_path) == ["shard"]


def test_a_disk_that_fills_up_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "shard", b"old")
    with full_disk(4096), pytest.raises(SmartKVError, match="could not be written"):
        write_atomically(tmp_path / "shard", b"n" * 10_000)
    assert (tmp_path / "shard").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["shard"]


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_truncated_shard_is_refused_by_name(left: int, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is damaged"):
        read_header(shard)
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is damaged"):
        ShardReader(shard.parent).read(RowBlock(shard.name, 0, 0, 4), "keys")


def test_a_flipped_bit_anywhere_is_found(shard: Path) -> None:
    write_shard(shard, shard_tensors(), {"thresholds": [0.05], "window": 16})
    whole = shard.read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        shard.write_bytes(data)
        try:
            said, held = digests(shard)
            assert said != held, place
        except SmartKVError:
            pass


def test_a_shard_that_is_missing_is_told_as_missing(shard: Path) -> None:
    shard.unlink()
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is missing"):
        read_header(shard)
    with pytest.raises(SmartKVError, match=r"shard\.safetensors is missing"):
        ShardReader(shard.parent).read(RowBlock(shard.name, 0, 0, 4), "keys")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"smartkv": "{"}])
def test_a_safetensors_file_of_others_is_refused(metadata: dict[str, str] | None, shard: Path) -> None:
    save_file({"keys": torch.zeros(1)}, shard, metadata=metadata)
    with pytest.raises(SmartKVError, match="not one that SmartKV wrote"):
        read_header(shard)


def test_a_tensor_that_a_shard_lacks_is_named(shard: Path) -> None:
    with pytest.raises(SmartKVError, match=r"shard\.safetensors has no usable 'keys_post_rope'"):
        ShardReader(shard.parent).read(RowBlock(shard.name, 0, 0, 4), "keys_post_rope")


# -- the manifest -----------------------------------------------------------------------------------------------------


def test_a_manifest_reads_as_it_was_written(shards: Manifest) -> None:
    assert [(entry.split, entry.windows, entry.tokens) for entry in shards.shards] == [
        ("train", 2, 32), ("train", 1, 16), ("validation", 3, 48),
    ]  # fmt: skip
    shards.write()
    assert Manifest.read(str(shards.folder)) == shards


def test_an_entry_holds_the_files_size_and_digest(shard: Path) -> None:
    entry = shard_entry(shard, "train", 2, 32)
    assert entry.file == "shard.safetensors"
    assert entry.bytes == len(shard.read_bytes())
    assert entry.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_a_folder_without_manifest_says_that_the_harvest_has_not_finished(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"manifest\.json is missing.*has not finished"):
        Manifest.read(tmp_path)


def test_a_listed_shard_that_is_missing_is_named(shards: Manifest) -> None:
    (shards.folder / shards.shards[1].file).unlink()
    with pytest.raises(SmartKVError, match=rf"{shards.shards[1].file} is missing"):
        Manifest.read(shards.folder)


def test_a_listed_shard_that_was_cut_off_is_named(shards: Manifest) -> None:
    path = shards.folder / shards.shards[2].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SmartKVError, match=rf"{path.name} is damaged"):
        Manifest.read(shards.folder)


@pytest.mark.parametrize("listed", ["../x", "sub/x", "/{folder}/x", "..", ".", ""])
def test_a_shard_outside_the_folder_is_refused(listed: str, shards: Manifest) -> None:
    entry = json.loads((shards.folder / "manifest.json").read_text())["shards"][0]
    data = (shards.folder / entry["file"]).read_bytes()
    (shards.folder / "sub").mkdir()
    for place in (shards.folder.parent / "x", shards.folder / "sub" / "x"):
        place.write_bytes(data)  # there, and of the right size
    change_manifest(shards.folder, shards=[entry | {"file": listed.format(folder=shards.folder.parent)}])
    with pytest.raises(SmartKVError, match=r"not a file name in its folder|is missing"):
        Manifest.read(shards.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1', "\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(text: str, shards: Manifest) -> None:
    (shards.folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SmartKVError, match=r"manifest\.json is damaged"):
        Manifest.read(shards.folder)


def test_another_format_version_is_refused_naming_both(shards: Manifest) -> None:
    change_manifest(shards.folder, format_version=99)
    with pytest.raises(SmartKVError, match=r"version 99.* reads 1"):
        Manifest.read(shards.folder)


KEYS = ("format_version", "fingerprint", "spec", "window", "sinks", "sources", "documents", "arguments", "shards")


@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_without_a_key_is_refused_by_that_key(key: str, shards: Manifest) -> None:
    change_manifest(shards.folder, **{key: ...})
    with pytest.raises(SmartKVError, match=rf"manifest\.json is damaged.*{key}"):
        Manifest.read(shards.folder)


@pytest.mark.parametrize("changes", [{"file": 3}, {"file": None}, {"surplus": 1}, {"split": ...}, {"split": "x"}])
def test_a_damaged_shard_entry_is_refused(changes: dict[str, Any], shards: Manifest) -> None:
    entry = json.loads((shards.folder / "manifest.json").read_text())["shards"][0] | changes
    change_manifest(shards.folder, shards=[{key: value for key, value in entry.items() if value is not ...}])
    with pytest.raises(SmartKVError, match=r"manifest\.json"):
        Manifest.read(shards.folder)


def test_a_threshold_that_was_not_harvested_is_refused_with_those_that_were(shards: Manifest) -> None:
    assert [shards.threshold_index(threshold) for threshold in (0.05, 0.1)] == [0, 1]
    with pytest.raises(SmartKVError, match=r"threshold 0\.2 .*0\.05, 0\.1"):
        shards.threshold_index(0.2)


# -- labelled keys ----------------------------------------------------------------------------------------------------


@quick
@given(
    window=st.integers(2, 20),
    sinks=st.integers(0, 5),
    follow_up=st.integers(1, 22),
    size=st.integers(1, 25),
    windows=st.lists(st.tuples(st.sampled_from(["train", "validation"]), st.integers(1, 3)), max_size=3),
)
def test_labelled_are_exactly_the_keys_followed_up_that_are_no_sinks(
    window: int, sinks: int, follow_up: int, size: int, windows: list[tuple[str, int]]
) -> None:
    entries = [ShardEntry(f"{n}", split, many, many * window, 0, "") for n, (split, many) in enumerate(windows)]
    fingerprint = Fingerprint("llama", 1, 1, 1, "")
    manifest = Manifest(Path("."), fingerprint, LabelSpec(), window, sinks, [], [], {}, entries)
    expected = []
    for entry in entries:
        for token in range(entry.tokens):
            position = token % window
            horizon = window - 1 - position
            if entry.split == "train" and position >= sinks and horizon >= follow_up:
                expected.append((entry.file, token // window, token))
    blocks = manifest.labelled("train", size, follow_up)
    found = [(block.file, block.window, token) for block in blocks for token in range(block.start, block.stop)]
    assert found == expected
    assert all(1 <= block.stop - block.start <= size for block in blocks)


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
