"""A real harvest of a tiny model, made once a worker."""

from pathlib import Path

import pytest

from tests.lightning_fixtures import harvest, write_texts


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_texts: Path) -> Path:
    """Shards of 7 training and 3 validation windows of 64 tokens."""
    return harvest(tmp_path_factory.mktemp("harvest") / "shards", tiny_backbone, tiny_texts)
