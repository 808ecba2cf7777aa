"""A finished run of the demo at tiny size, which several tests of `eval` read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from smartkv import Manifest
from smartkv.shards.labelled_keys import LabelledKeys
from tests.eval.eviction.test_perplexity import measure
from tests.lightning_fixtures import fit, harvest, write_texts


@pytest.fixture(scope="session")
def demo_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path
) -> Path:
    """The folder that harvest, fit and `eval gates` leave, as the demo's."""
    root = tmp_path_factory.mktemp("run")
    (root / "shards").symlink_to(tiny_shards)
    export = {"class_path": "GateExport", "init_args": {"out": str(root / "gates" / "export")}}
    fit(tiny_shards, root / "gates", callbacks=[export])
    arguments = ["--gates", root / "gates" / "export", "--shards", root / "shards", "--out", root / "scores"]
    main(["gates", *map(str, arguments)])
    measure(root / "perplexity", tiny_backbone, tiny_texts, gates=root / "gates" / "export", split="validation",
            policies='["all-gated", "window"]', footprints="[0.3, 0.5, 0.8]")  # fmt: skip
    return root


@pytest.fixture(scope="session")
def demo_scores(demo_run: Path) -> dict[str, Any]:
    return json.loads((demo_run / "scores" / "gates.json").read_text())


@pytest.fixture(scope="session")
def demo_rows(demo_run: Path) -> LabelledKeys:
    return LabelledKeys(Manifest.read(demo_run / "shards"), 0.05)


def whole_split(rows: LabelledKeys, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = rows.blocks(split)
    keys = torch.cat([rows.keys(block) for block in blocks], dim=1)
    return keys, torch.cat([rows.target(block) for block in blocks], dim=1)


@pytest.fixture(scope="session")
def recall_shards(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """Windows of plain text, and of text that asks back."""
    folder = tmp_path_factory.mktemp("shards")
    texts = write_texts(folder / "books", ["train", "validation", "test"])
    sources = [
        {"name": "pg19", "weight": 0.5, "origins": ["local"]},
        {"name": "recall", "weight": 0.5, "origins": ["local"]},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMARTKV_DATA", str(folder))
        return harvest(
            folder / "shards",
            tiny_backbone,
            texts,
            windows={"train": 4, "validation": 2},
            data={"window": 512, "sources": sources},
        )
