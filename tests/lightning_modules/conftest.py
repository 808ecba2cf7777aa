"""A real fit at a tiny size, made once a worker, and a harvest to be tampered with."""

import shutil
from pathlib import Path

import pytest

from tests.lightning_fixtures import Watcher, fit


@pytest.fixture
def copied(tmp_path: Path, tiny_shards: Path) -> Path:
    """The finished harvest, to be tampered with."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `trained`."""
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="session")
def trained(tiny_shards: Path, root: Path) -> Watcher:
    """Two epochs on the tiny harvest, with a checkpoint every second step: step=2.ckpt, step=4.ckpt, …"""
    often = {"dirpath": str(root / "checkpoints"), "every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    return fit(tiny_shards, root, callbacks=[{"class_path": "ModelCheckpoint", "init_args": often}])
