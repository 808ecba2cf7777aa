"""Locks on folders, and folders on a file system that has none."""

import errno
import fcntl
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from smartkv.errors import SmartKVError
from smartkv.io.atomic import PART
from smartkv.io.locks import LOCK, lock_folder


def test_a_folder_that_another_run_has_locked_is_refused_until_it_lets_go(tmp_path: Path) -> None:
    (tmp_path / f".shard.abc{PART}").touch()
    with FileLock(tmp_path / LOCK), pytest.raises(SmartKVError, match=f"another run is writing into {tmp_path}"):
        lock_folder(tmp_path)
    assert (tmp_path / f".shard.abc{PART}").exists()  # the other run may be writing it
    lock_folder(tmp_path)


def test_a_folder_is_made_and_locked_and_freed_of_partial_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".shard.abc{PART}").touch()
    lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "run" / f".shard.abc{PART}").exists()
    for folder in (tmp_path / "run", tmp_path / "new" / "run"):
        with pytest.raises(Timeout):
            FileLock(folder / LOCK).acquire(blocking=False)


def test_a_lock_that_this_process_has_is_not_taken_again(tmp_path: Path) -> None:
    lock_folder(tmp_path)
    (tmp_path / f".shard.abc{PART}").touch()  # this process is writing it
    lock_folder(str(tmp_path / "x" / ".."))
    assert (tmp_path / f".shard.abc{PART}").exists()


def raising(error: Exception) -> object:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (fcntl, "flock", OSError(errno.ENOTSUP, "Operation not supported")),  # what the kernel says
        (FileLock, "acquire", NotImplementedError()),  # what filelock 3 makes of ENOSYS, another of its answers
    ],
)
def test_a_file_system_without_locks_is_told_of_and_stops_nothing(
    owner: object,
    name: str,
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(owner, name, raising(error))
    lock_folder(tmp_path / "run")
    assert "without locks" in caplog.text and (tmp_path / "run").is_dir()
