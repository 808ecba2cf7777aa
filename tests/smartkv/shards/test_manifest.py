"""The manifest of a folder of shards, and the row blocks that it lists."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import LabelSpec
from smartkv.models.architecture import Fingerprint
from smartkv.shards.manifest import Manifest, ShardEntry, heads_of, recorded_shards, shard_entry, shard_header
from smartkv.shards.shard_file import read_header, write_shard
from tests.models import write_tiny_shards

quick = settings(deadline=None, max_examples=30, derandomize=True)


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest again with other values. The value `...` removes a key."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


# -- the manifest -----------------------------------------------------------------------------------------------------


def test_a_manifest_reads_as_it_was_written(shards: Manifest) -> None:
    assert [(entry.split, entry.windows, entry.tokens) for entry in shards.shards] == [
        ("train", 2, 32), ("train", 1, 16), ("validation", 3, 48),
    ]  # fmt: skip
    shards.write()
    assert Manifest.read(str(shards.folder)) == shards


def test_a_shards_header_has_the_fields_of_the_format() -> None:
    header = shard_header(Fingerprint("llama", 2, 3, 8, "0"), LabelSpec((0.05, 0.1), (1, 4), 9), window=16, sinks=2)
    assert header == {
        "format_version": 1,
        "fingerprint": {"model_type": "llama", "layers": 2, "kv_heads": 3, "head_dim": 8, "weight_hash": "0"},
        "thresholds": [0.05, 0.1],
        "ages": [1, 4],
        "follow_up": 9,
        "window": 16,
        "sinks": 2,
    }


def test_the_shortest_follow_up_and_age_are_1_token(tmp_path: Path) -> None:
    spec = write_tiny_shards(tmp_path, follow_up=1, ages=(1,)).spec
    assert (spec.follow_up, spec.ages) == (1, (1,))


def test_a_model_of_one_layer_with_one_head_is_a_model(tmp_path: Path) -> None:
    fingerprint = write_tiny_shards(tmp_path, layers=1, kv_heads=1).fingerprint
    assert (fingerprint.layers, fingerprint.kv_heads) == (1, 1)


def test_equal_manifests_are_equal_bytes_in_any_order_of_arguments(shards: Manifest) -> None:
    written = []
    for arguments in ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}):
        replace(shards, arguments=arguments).write()
        written.append((shards.folder / "manifest.json").read_bytes())
    assert written[0] == written[1]


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


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("window", 0, "window"),
        ("window", 1.5, "window"),
        ("sinks", -1, "sinks"),
        ("sources", {}, "sources"),
        ("documents", "a", "documents"),
        ("arguments", [], "arguments"),
        ("shards", {}, "shards"),
        ("spec", {"thresholds": ["a"], "ages": [], "follow_up": 4}, "thresholds"),
        ("spec", {"thresholds": [0.05], "ages": [0], "follow_up": 4}, "ages"),
        ("spec", {"thresholds": [0.05], "ages": [], "follow_up": 0}, "follow_up"),
        (
            "fingerprint",
            {"model_type": "llama", "layers": 0, "kv_heads": 2, "head_dim": 4, "weight_hash": ""},
            "layers",
        ),
    ],
)
def test_a_value_that_no_harvest_writes_is_refused_by_its_name(
    key: str, value: Any, named: str, shards: Manifest
) -> None:
    change_manifest(shards.folder, **{key: value})
    with pytest.raises(SmartKVError, match=rf"manifest\.json is damaged .*: {named} must be "):
        Manifest.read(shards.folder)


def change_first_entry(folder: Path, **changes: Any) -> None:
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    change_manifest(folder, shards=[entries[0] | changes, *entries[1:]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 33}, "has tokens 32, its manifest says 33"),
        ({"split": "test"}, "has split 0, its manifest says 2"),
        ({"windows": 1}, r"has keys of shape \[2, 2, 32, \d+\], its manifest says \[2, 2, 16, \d+\]"),
    ],
)
def test_an_entry_that_is_not_as_its_shard_is_refused_naming_both(
    changes: dict[str, Any], message: str, shards: Manifest
) -> None:
    change_first_entry(shards.folder, **changes)
    with pytest.raises(SmartKVError, match=message):
        Manifest.read(shards.folder)


@pytest.mark.parametrize(("lacks", "message"), [("keys", "has keys of shape None"), ("split", "has split None")])
def test_a_shard_without_its_tensors_is_refused_by_what_it_lacks(lacks: str, message: str, shards: Manifest) -> None:
    path = shards.folder / shards.shards[0].file
    tensors = load_file(path)
    del tensors[lacks]
    write_shard(path, tensors, read_header(path))
    change_first_entry(shards.folder, bytes=path.stat().st_size)
    with pytest.raises(SmartKVError, match=message):
        Manifest.read(shards.folder)


def test_a_shard_of_an_early_version_has_no_sinks_in_its_header(shards: Manifest) -> None:
    path = shards.folder / shards.shards[0].file
    header = read_header(path)
    del header["sinks"]
    write_shard(path, load_file(path), header)
    change_first_entry(shards.folder, bytes=path.stat().st_size)
    assert Manifest.read(shards.folder).sinks == 2


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
    rows = [(block.file, block.window, token) for block in blocks for token in range(block.start, block.stop)]
    assert rows == expected
    assert all(1 <= block.stop - block.start <= size for block in blocks)


def test_a_shard_that_was_changed_is_found_when_it_is_verified(shards: Manifest) -> None:
    shards.verify(shards.shards)
    path = shards.folder / shards.shards[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the size stays
    path.write_bytes(data)
    shards.verify(shards.of_split("validation"))
    with pytest.raises(SmartKVError, match=rf"{path.name} is not what was harvested"):
        shards.verify(shards.of_split("train"))


def test_the_digest_follows_from_the_shards_alone(shards: Manifest) -> None:
    again = replace(shards, folder=Path("elsewhere"), arguments={"seed": 1})
    assert again.digest == shards.digest and len(shards.digest) == 16
    assert replace(shards, shards=shards.shards[:-1]).digest != shards.digest


def test_recorded_shards_are_those_of_the_manifest_or_none(shards: Manifest, tmp_path: Path) -> None:
    assert recorded_shards(shards.folder) == {entry.file: entry for entry in shards.shards}
    assert recorded_shards(tmp_path / "nothing") == {}
    (shards.folder / "manifest.json").write_text("{")
    assert recorded_shards(shards.folder) == {}


def test_heads_are_in_the_order_of_the_gates() -> None:
    fingerprint = Fingerprint("llama", 2, 3, 8, "0")
    assert list(heads_of(fingerprint)) == GateBank(fingerprint).heads
