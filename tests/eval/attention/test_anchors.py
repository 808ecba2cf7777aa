"""`python -m eval anchors` on a tiny backbone."""

import json
from pathlib import Path

import pytest

from eval.__main__ import main
from tests.lightning_fixtures import write_texts


def test_anchors_are_where_the_attention_goes(tmp_path: Path, tiny_backbone: Path) -> None:
    texts = write_texts(tmp_path / "texts", splits=["validation"])
    sources = json.dumps([{"name": "mine", "path": str(texts)}])
    options = ["--sources", sources, "--windows", "2", "--window", "96", "--recent", "8", "--dtype", "float32"]
    main(["anchors", "--backbone", str(tiny_backbone), "--out", str(tmp_path / "out"), *options])
    found = json.loads((tmp_path / "out" / "anchors.json").read_text())
    assert sum(found["keys"]) == pytest.approx(1.0) and found["classes"][:2] == ["sink", "recent"]
    for layer in found["attention"]:
        assert sum(layer) == pytest.approx(1.0)
    # queries 24 … 95 see 4 sinks and 8 recent tokens each
    keys = sum(query + 1 for query in range(24, 96))
    assert found["keys"][:2] == pytest.approx([72 * 4 / keys, 72 * 8 / keys])
    assert (tmp_path / "out" / "anchors.png").stat().st_size > 10_000
