"""Atomic writes, when all is well and when the disk or the folder is not."""

import os
import stat
from pathlib import Path

import pytest

from smartkv.errors import SmartKVError
from smartkv.io.atomic import PART, delete_partial_files, write_atomically
from tests.harm import full_disk


def test_a_file_has_its_content_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "folder" / "file", b"first")
    write_atomically(tmp_path / "new" / "folder" / "file", memoryview(b"second"))
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"second"
    assert os.listdir(tmp_path / "new" / "folder") == ["file"]


def test_a_reader_of_the_old_file_keeps_it_while_it_is_replaced(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with (tmp_path / "file").open("rb") as reader:
        write_atomically(tmp_path / "file", b"new")
        assert reader.read() == b"old"


def test_the_data_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a machine that stops between the two would leave an empty file under the name."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: (calls.append("sync"), sync(*args)))
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("rename"), replace(*args)))
    write_atomically(tmp_path / "file", b"x")
    assert calls == ["sync", "rename"]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "atomic", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


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


def test_partial_files_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    for name in (f".last.ckpt.abc{PART}", f".other.def{PART}", "last.ckpt", f"mine{PART}", ".hidden"):
        (tmp_path / name).touch()
    delete_partial_files(tmp_path, "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == [".hidden", f".other.def{PART}", "last.ckpt", f"mine{PART}"]
    delete_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "last.ckpt", f"mine{PART}"]
