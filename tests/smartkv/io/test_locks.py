"""A folder on a file system that has no locks."""

import errno
import fcntl
from pathlib import Path

import pytest
from filelock import FileLock

from smartkv.io.locks import lock_folder


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
