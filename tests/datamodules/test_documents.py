"""The plan of windows: fixed before anything runs, kept beside the shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datamodules.documents import DocumentWindows
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import PLAN, WindowCounts, WindowPlan, plan_windows, read_plan
from tests.lightning_fixtures import WINDOW, shard_bytes, write_texts
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COUNTS = {"train": 6, "validation": 3, "test": 2}


def plan_of(sources: list[SourceConfig], counts: dict[str, int] | None = None, **settings: Any) -> WindowPlan:
    return plan_windows(sources, counts or COUNTS, TOKENIZER, **{"window": WINDOW, "say": lambda _: None} | settings)


def own(path: Path, name: str = "mine", weight: float = 1.0) -> SourceConfig:
    return SourceConfig(name, weight=weight, path=str(path))


# -- the plan on disk -------------------------------------------------------------------------------------------------


def windows_of(out: Path, backbone: Path, texts: Path, **changes: Any) -> DocumentWindows:
    counts = changes.pop("windows", WindowCounts(4, 2))
    sources = changes.pop("sources", [own(texts)])
    settings = {"sources": sources, "windows": counts, "backbone": str(backbone), "window": WINDOW}
    return DocumentWindows(str(out), **settings | changes)


def test_a_plan_reads_back_as_it_was_made(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path) -> None:
    windows_of(tmp_path, tiny_backbone, tiny_texts).prepare_data()
    made, read = plan_of([own(tiny_texts)], {"train": 4, "validation": 2, "test": 0}), read_plan(tmp_path)
    assert torch.equal(made.tokens, read.tokens) and torch.equal(made.document, read.document)
    assert (made.documents, made.sources) == (read.documents, read.sources)


def test_a_plan_that_is_there_is_kept_although_the_texts_changed(tmp_path: Path, tiny_backbone: Path) -> None:
    texts, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    windows_of(out, tiny_backbone, texts).prepare_data()
    before = (out / PLAN).read_bytes()
    (texts / "train" / "train0.txt").write_text("something else " * 100)
    windows_of(out, tiny_backbone, texts).prepare_data()
    assert (out / PLAN).read_bytes() == before


CHANGES: dict[str, Any] = {
    "seed": 1,
    "window": 32,
    "counts": WindowCounts(5, 2),
    "windows_per_document": 3,
    "windows_per_shard": 1,
    "sources": [SourceConfig("builtin")],
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_argument_is_refused_once_there_are_shards_naming_what_differs(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, name: str
) -> None:
    windows_of(tmp_path, tiny_backbone, tiny_texts).prepare_data()
    (tmp_path / "train-00000.safetensors").write_bytes(b"harvested")
    before = shard_bytes(tmp_path)
    change = {"windows" if name == "counts" else name: CHANGES[name]}
    with pytest.raises(SmartKVError, match=rf"holds another harvest \(it differs in {name}\)"):
        windows_of(tmp_path, tiny_backbone, tiny_texts, **change).prepare_data()
    assert shard_bytes(tmp_path) == before


def test_a_plan_without_shards_gives_way_to_another(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path) -> None:
    windows_of(tmp_path, tiny_backbone, tiny_texts).prepare_data()
    windows_of(tmp_path, tiny_backbone, tiny_texts, window=32).prepare_data()
    assert read_plan(tmp_path).tokens.shape == (6, 32)


def test_a_window_beyond_the_model_s_positions_is_refused_before_it_is_planned(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    with pytest.raises(SmartKVError, match="window 600 is longer than the 512 positions"):
        windows_of(tmp_path, tiny_backbone, tiny_texts, window=600).prepare_data()
    assert not (tmp_path / PLAN).exists()


def test_windows_per_shard_below_one_is_refused(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path) -> None:
    with pytest.raises(SmartKVError, match="windows_per_shard must be at least 1"):
        windows_of(tmp_path, tiny_backbone, tiny_texts, windows_per_shard=0).prepare_data()


@pytest.mark.parametrize("harm", [lambda data: data[:-10], lambda data: data[:-10] + b"!" + data[-9:]])
def test_a_damaged_plan_is_made_again(
    harm: Callable[[bytes], bytes],
    tmp_path: Path,
    tiny_backbone: Path,
    tiny_texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    windows_of(tmp_path, tiny_backbone, tiny_texts).prepare_data()
    before = (tmp_path / PLAN).read_bytes()
    (tmp_path / PLAN).write_bytes(harm(before))
    windows_of(tmp_path, tiny_backbone, tiny_texts).prepare_data()
    assert f"{tmp_path / PLAN} is damaged" in capsys.readouterr().out
    assert (tmp_path / PLAN).read_bytes() == before


def test_a_tokenizer_that_cannot_be_had_is_told_in_one_line(tmp_path: Path, tiny_texts: Path) -> None:
    with pytest.raises(SmartKVError, match="no/such-model"):
        windows_of(tmp_path, Path("no/such-model"), tiny_texts).prepare_data()


def test_the_loader_gives_each_shard_s_windows_in_order(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path) -> None:
    data = windows_of(tmp_path, tiny_backbone, tiny_texts, windows_per_shard=3)
    data.prepare_data()
    data.setup("predict")
    runs = list(data.predict_dataloader())
    assert [run.file for run in runs] == ["train-00000.safetensors", "train-00001.safetensors",
                                          "validation-00000.safetensors"]  # fmt: skip
    assert torch.equal(torch.cat([run.tokens for run in runs]), load_file(tmp_path / PLAN)["tokens"])
