"""A fit that the tests of several callbacks look at."""

from pathlib import Path

import pytest

from tests.callbacks.fixtures import Run, callbacks, run


@pytest.fixture(scope="session")
def tiny(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs on the harvest of the tiny model."""
    root = tmp_path_factory.mktemp("tiny")
    dashboard = {"class_path": "HeadDashboard", "init_args": {"sample_windows": 2}}
    return run(tiny_shards, root, [*callbacks(root, per_head=True), dashboard])
