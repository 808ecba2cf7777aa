"""A folder on a file system that has no locks."""

from pathlib import Path

import pytest
from filelock import FileLock

from smartkv.folders import hold


def test_a_file_system_without_locks_is_told_of_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refuse)
    hold(tmp_path / "run")
    assert "without locks" in caplog.text and (tmp_path / "run").is_dir()
