"""What was damaged is made again or refused, and told in a line."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.checkpoint_io import read_checkpoint
from smartkv.errors import SmartKVError
from smartkv.io.atomic import PART, write_atomically
from smartkv.io.locks import LOCK, lock_folder
from smartkv.shards.manifest import MANIFEST, Manifest, shard_entry
from smartkv.shards.shard_file import read_header, write_shard
from tests.harm import full_disk
from tests.lightning_fixtures import (
    error_line,
    gates_config,
    harvest_by_trainer,
    refused,
    run_cli,
    shard_bytes,
    write_config,
)
from tests.models import shard_tensors, write_tiny_shards
from tests.survival.test_damage import flipped

# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards", ignore=shutil.ignore_patterns(LOCK)))


def test_a_shard_with_a_flipped_bit_is_made_again_by_the_same_harvest(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    path = copied / "train-00001.safetensors"
    flipped(path, 4 * path.stat().st_size)
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert shard_bytes(copied) == shard_bytes(tiny_shards)
    assert (copied / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


def test_a_file_of_another_kind_under_a_shard_s_name_is_left_alone(
    copied: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    path = copied / "train-00001.safetensors"
    write_atomically(path, (copied / "validation-00000.safetensors").read_bytes().replace(b'"smartkv"', b'"another"'))
    before = path.read_bytes()
    with pytest.raises(SmartKVError, match="not one that SmartKV wrote"):
        harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert path.read_bytes() == before


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "thresholds": lambda manifest: manifest["spec"].update(thresholds=manifest["spec"]["thresholds"][::-1]),
    "one threshold more": lambda manifest: manifest["spec"]["thresholds"].append(0.5),
    "ages": lambda manifest: manifest["spec"].update(ages=[3, 5]),
    "follow-up": lambda manifest: manifest["spec"].update(follow_up=7),
    "model": lambda manifest: manifest["fingerprint"].update(weights="another"),
    "sinks": lambda manifest: manifest.update(sinks=5),
    "split": lambda manifest: manifest["shards"][0].update(split="validation"),
    "no shards": lambda manifest: manifest.update(shards=[]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_says_something_else_than_its_shards_is_refused(
    lie: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    LIES[lie](manifest)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SmartKVError, match="manifest"):
        Manifest.read(copied)
    config = write_config(tmp_path / "fit.yaml", gates_config(copied, tmp_path / "fit"))
    assert "run the same harvest again" in error_line(refused(capsys, "fit", "-c", config))


@pytest.mark.parametrize("lie", LIES)
def test_the_same_harvest_sets_such_a_manifest_right(
    lie: str, copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    LIES[lie](manifest)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert (copied / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


@pytest.mark.parametrize("harm", ["split", "header"])
def test_a_shard_that_says_what_none_can_is_refused(harm: str, tmp_path: Path) -> None:
    manifest = write_tiny_shards(tmp_path / "shards")
    path = manifest.folder / manifest.shards[0].file
    tensors, header = load_file(path), read_header(path)
    if harm == "header":
        save_file(tensors, path, {"smartkv": json.dumps([1])})
    else:
        tensors["split"][:] = 9
        write_shard(path, tensors, header)
    entries = [shard_entry(path, "train", manifest.shards[0].windows, manifest.shards[0].tokens), *manifest.shards[1:]]
    replace(manifest, shards=entries).write()
    with pytest.raises(SmartKVError, match="not one that SmartKV wrote" if harm == "header" else "its manifest says"):
        Manifest.read(manifest.folder)


def test_a_validation_reads_no_damaged_shard(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "validation-00000.safetensors"
    flipped(path, 4 * path.stat().st_size)
    config = write_config(tmp_path / "validate.yaml", gates_config(copied, tmp_path / "validate"))
    assert "SHA-256" in error_line(refused(capsys, "validate", "-c", config))


# -- shards of a harvest that goes on ---------------------------------------------------------------------------------


@pytest.fixture
def unfinished(copied: Path) -> Path:
    """As if killed before the manifest: nothing but the shards themselves tells of them."""
    (copied / MANIFEST).unlink()
    return copied


def test_a_flipped_bit_in_a_shard_of_an_unfinished_harvest_is_not_sealed_into_the_manifest(
    unfinished: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unfinished / "train-00001.safetensors"
    flipped(path, 4 * path.stat().st_size)
    harvest_by_trainer(unfinished, tiny_backbone, tiny_texts)
    assert shard_bytes(unfinished) == shard_bytes(tiny_shards)
    assert (unfinished / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()
    assert f"made again in {unfinished}: {path.name} (damaged)" in capsys.readouterr().out.splitlines()


def test_a_shard_of_another_seed_gives_way_to_our_own(
    unfinished: Path,
    tmp_path: Path,
    tiny_backbone: Path,
    tiny_texts: Path,
    tiny_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = harvest_by_trainer(tmp_path / "other", tiny_backbone, tiny_texts, data={"seed": 1})
    shutil.copy(other / "train-00001.safetensors", unfinished)
    harvest_by_trainer(unfinished, tiny_backbone, tiny_texts)
    assert shard_bytes(unfinished) == shard_bytes(tiny_shards)
    assert "train-00001.safetensors (of other windows than planned)" in capsys.readouterr().out


@pytest.mark.parametrize("listed", [False, True])
def test_a_shard_of_another_number_of_windows_gives_way_to_our_own(
    listed: bool, copied: Path, tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    """Also where an earlier version has listed it in the manifest, which then cannot be read."""
    more = {"train": 8, "validation": 3}  # the last training shard has two windows, and ours has one
    other = harvest_by_trainer(tmp_path / "other", tiny_backbone, tiny_texts, windows=more)
    manifest = Manifest.read(copied)
    shutil.copy(other / "train-00003.safetensors", copied)
    if listed:
        lines = [shard_entry(copied / line.file, line.split, line.windows, line.tokens) for line in manifest.shards]
        replace(manifest, shards=lines).write()
        with pytest.raises(SmartKVError, match="run the same harvest again"):
            Manifest.read(copied)
    else:
        (copied / MANIFEST).unlink()
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert Manifest.read(copied).shards == Manifest.read(tiny_shards).shards
    assert shard_bytes(copied) == shard_bytes(tiny_shards)


def test_a_run_of_a_few_batches_does_not_pass_off_the_damaged_shards_that_it_did_not_reach(
    unfinished: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    for number in (0, 1):
        path = unfinished / f"train-0000{number}.safetensors"
        flipped(path, 4 * path.stat().st_size)
    harvest_by_trainer(unfinished, tiny_backbone, tiny_texts, trainer={"limit_predict_batches": 1})
    assert not (unfinished / MANIFEST).exists()


def of_an_earlier_version(folder: Path) -> None:
    """All shards as they were written before their headers had a digest and the sinks; and the manifest, if any."""
    for path in folder.glob("*-*.safetensors"):
        header = {key: value for key, value in read_header(path).items() if key != "sinks"}
        save_file(load_file(path), path, {"smartkv": json.dumps(header)})
    if (folder / MANIFEST).exists():
        data = json.loads((folder / MANIFEST).read_text())
        for line in data["shards"]:
            entry = shard_entry(folder / line["file"], line["split"], line["windows"], line["tokens"])
            line.update(bytes=entry.bytes, sha256=entry.sha256)
        (folder / MANIFEST).write_text(json.dumps(data))


def test_a_finished_harvest_of_an_earlier_version_is_kept_as_it_is(
    copied: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    of_an_earlier_version(copied)
    before, manifest = shard_bytes(copied), Manifest.read(copied)
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert shard_bytes(copied) == before and Manifest.read(copied) == manifest


def test_an_unfinished_harvest_of_an_earlier_version_is_made_again(
    unfinished: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_an_earlier_version(unfinished)
    harvest_by_trainer(unfinished, tiny_backbone, tiny_texts)
    assert shard_bytes(unfinished) == shard_bytes(tiny_shards)
    assert "and 3 more (of an earlier version" in capsys.readouterr().out


# -- what killed writers leave ----------------------------------------------------------------------------------------


def test_the_next_run_in_a_folder_sweeps_what_a_killed_one_left_half_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000.safetensors", shard_tensors(), {})
    (tmp_path / f".train-00001.safetensors.k3jd82hs{PART}").write_bytes(b"half")
    (tmp_path / ".hidden").write_text("a user's own")
    lock_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", LOCK, "train-00000.safetensors"]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saving(shards: Path, root: Path) -> dict[str, Any]:
    last = {"dirpath": str(root / "checkpoints"), "every_n_train_steps": 2, "save_last": True, "save_top_k": 0}
    config = gates_config(shards, root, callbacks=[{"class_path": "ModelCheckpoint", "init_args": last}])
    config["trainer"]["enable_checkpointing"] = True
    return config


def test_a_fit_s_checkpoints_do_not_go_through_the_folder_of_temporary_files(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on another disk, where renaming is copying."""
    config = write_config(tmp_path / "fit.yaml", saving(tiny_shards, tmp_path / "fit"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    run_cli("fit", "-c", config)
    assert read_checkpoint(tmp_path / "fit/checkpoints/last.ckpt")["global_step"] > 0


def test_a_fit_on_a_full_disk_stops_in_a_line(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", saving(tiny_shards, tmp_path / "fit"))
    with full_disk(6000):
        assert "could not be written: File too large" in error_line(refused(capsys, "fit", "-c", config))
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob(f"*{PART}"))


DAMAGE: dict[str, tuple[Callable[[bytes], bytes] | None, str]] = {
    "truncated": (lambda data: data[: len(data) // 2], "is damaged"),
    "empty": (lambda data: b"", "is damaged"),
    "text": (lambda data: b"a text", "is damaged"),
    "missing": (None, "there is no checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_none_is_told_in_a_line(
    damage: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (harm, said) = tmp_path / "some.ckpt", DAMAGE[damage]
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, path)
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "fit"))
    told = error_line(refused(capsys, "fit", "-c", config, "--ckpt_path", path))
    assert said in told and str(path) in told
