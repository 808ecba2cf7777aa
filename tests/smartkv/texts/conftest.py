"""A data folder with every named source, and its absence."""

from pathlib import Path

import pytest

from smartkv.shards.manifest import SPLITS
from tests.lightning_fixtures import prose
from tests.smartkv.texts.fixtures import RECORDS, wikitext, write_jsonl


@pytest.fixture
def local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with every named source, pointed at by SMARTKV_DATA."""
    for name, records in RECORDS.items():
        write_jsonl(tmp_path / "data" / name, records)
    for split in SPLITS:
        for number in range(3):
            path = tmp_path / "data" / "books" / split / f"{split}-book-{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{split} {number} " + prose(50, number))
    (tmp_path / "data/webtext/wikitext-2.valid.txt").write_text(wikitext(0, 60))
    (tmp_path / "data/webtext/wikitext-2-raw.test.txt").write_text(wikitext(100, 20))
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a data folder nor the hub."""
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
