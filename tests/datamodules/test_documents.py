"""The plan of windows: fixed before anything runs, kept beside the shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from datamodules.documents import DocumentWindows
from datamodules.shard_plan import shard_runs
from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import PLAN, WindowCounts, WindowPlan, plan_windows, read_plan
from tests.lightning_fixtures import WINDOW, prose, shard_bytes, write_texts
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COUNTS = {"train": 6, "validation": 3, "test": 2}


def plan_of(sources: list[SourceConfig], counts: dict[str, int] | None = None, **settings: Any) -> WindowPlan:
    return plan_windows(sources, counts or COUNTS, TOKENIZER, **{"window": WINDOW, "say": lambda _: None} | settings)


def own(path: Path, name: str = "mine", weight: float = 1.0) -> SourceConfig:
    return SourceConfig(name, weight=weight, path=str(path))


def used(plan: WindowPlan, split: str) -> set[str]:
    """Names of the documents of one split's windows."""
    return {plan.documents[i] for i in plan.document[plan.split == SPLITS.index(split)].flatten().tolist()}


@pytest.fixture
def undivided(tmp_path: Path) -> Path:
    """40 texts without split subfolders, long and short."""
    folder = tmp_path / "undivided"
    folder.mkdir()
    for number in range(40):
        (folder / f"text{number}.txt").write_text(prose(30 if number % 2 else 200, seed=number))
    return folder


# -- which windows there are ------------------------------------------------------------------------------------------


def test_no_document_is_in_two_splits(undivided: Path) -> None:
    plan = plan_of([own(undivided), SourceConfig("builtin")])
    train, validation, test = (used(plan, split) for split in SPLITS)
    assert train and validation and test
    assert not train & validation and not train & test and not validation & test


def test_each_token_comes_from_the_document_it_names(undivided: Path) -> None:
    plan = plan_of([own(undivided)])
    for tokens, owners in zip(plan.tokens, plan.document, strict=True):
        for index in owners.unique().tolist():
            text = (undivided / plan.documents[index].replace("mine/", "")).with_suffix(".txt").read_text()
            assert TOKENIZER.decode(tokens[owners == index].tolist()).rstrip("\n") in text


def test_each_split_has_as_many_windows_as_asked_for(undivided: Path) -> None:
    plan = plan_of([own(undivided), SourceConfig("builtin")])
    assert {split: len(plan.of_split(split)) for split in SPLITS} == COUNTS


def test_windows_are_ordered_by_split(undivided: Path) -> None:
    split = plan_of([own(undivided)]).split
    assert torch.equal(split, split.sort().values)


def test_weights_decide_each_source_s_windows(tmp_path: Path) -> None:
    heavy, light = write_texts(tmp_path / "heavy"), write_texts(tmp_path / "light")
    plan = plan_of([own(heavy, "heavy", 3), own(light, "light", 1)], {"train": 8, "validation": 4})
    train = plan.document[plan.split == 0][:, 0].tolist()
    assert [plan.documents[i].partition("/")[0] for i in sorted(train)] == ["heavy"] * 6 + ["light"] * 2


def test_the_plan_records_each_source_s_windows(tmp_path: Path) -> None:
    heavy, light = write_texts(tmp_path / "heavy"), write_texts(tmp_path / "light")
    plan = plan_of([own(heavy, "heavy", 3), own(light, "light", 1)], {"train": 8, "validation": 4})
    assert plan.sources == [
        {"name": "heavy", "origin": "local", "windows": {"train": 6, "validation": 3, "test": 0}},
        {"name": "light", "origin": "local", "windows": {"train": 2, "validation": 1, "test": 0}},
    ]


def test_the_same_seed_gives_the_same_plan(undivided: Path) -> None:
    first, second = (plan_of([own(undivided)], seed=5) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)


def test_another_seed_gives_another_plan(undivided: Path) -> None:
    first, second = (plan_of([own(undivided)], seed=seed) for seed in (5, 6))
    assert not torch.equal(first.tokens, second.tokens)


def test_sources_that_fall_back_on_the_same_prose_repeat_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    sources = [SourceConfig(name, origins=["local", "builtin"]) for name in ("pg19", "gsm8k")]
    plan = plan_of(sources, {"train": 40, "validation": 4}, windows_per_document=1)
    assert len({tuple(row) for row in plan.tokens.tolist()}) == 44


def test_sources_that_fall_back_on_the_same_prose_keep_their_share_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    sources = [SourceConfig(name, weight=1, origins=["local", "builtin"]) for name in ("pg19", "gsm8k")]
    plan = plan_of([*sources, own(write_texts(tmp_path), weight=2)], {"train": 8})
    assert {s["name"]: s["windows"]["train"] for s in plan.sources} == {"builtin": 4, "mine": 4}


def test_two_folders_under_one_name_are_not_silently_made_one(tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "first"), tmp_path / "second"
    for split in ("train", "validation"):
        (second / split).mkdir(parents=True)
        (second / split / "numbers.txt").write_text("0123456789" * 60)
    try:
        plan = plan_of([own(first), own(second)], {"train": 8, "validation": 2})
    except SmartKVError:
        return  # saying so would do as well
    texts = [TOKENIZER.decode(row) for row in plan.tokens.tolist()]
    assert any("012345" in text for text in texts) and any("river" in text for text in texts)


def test_a_source_with_too_few_windows_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    plan_of([own(write_texts(tmp_path))], {"train": 1000}, say=said.append)
    assert any("'mine' has only 27 of 1000 train windows" in line for line in said)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_empty_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "empty.txt").write_text("")
    with pytest.raises(SmartKVError, match=f"no train window of {WINDOW} tokens: they are empty or shorter"):
        plan_of([own(tmp_path)], {"train": 1})


def test_a_window_longer_than_the_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="no train window of 4096 tokens"):
        plan_of([own(write_texts(tmp_path))], {"train": 1}, window=4096)


def test_a_folder_without_the_split_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="no validation window"):
        plan_of([own(write_texts(tmp_path, splits=["train"]))], {"train": 1, "validation": 1})


@pytest.mark.parametrize("counts", [{"train": 0, "validation": 0}, {"train": 2, "validation": -1}])
def test_counts_below_zero_or_all_zero_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(SmartKVError, match="windows must be 0 or more"):
        plan_of([own(write_texts(tmp_path))], counts)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"windows_per_document": 0}])
def test_lengths_below_one_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(SmartKVError, match="must be at least 1"):
        plan_of([own(write_texts(tmp_path))], {"train": 1}, **wrong)


# -- cutting the plan into shards -------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> WindowPlan:
    counts = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any))
    split = torch.tensor([s for s, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    tokens = torch.arange(len(split), dtype=torch.int32)[:, None].expand(-1, 2)
    return WindowPlan(tokens, tokens, split, [], [])


@given(plan=plans(), windows_per_shard=st.integers(1, 5))
def test_shards_hold_every_window_exactly_once(plan: WindowPlan, windows_per_shard: int) -> None:
    held = [w for run in shard_runs(plan, windows_per_shard) for w in range(run.first, run.first + run.windows)]
    assert sorted(held) == list(range(len(plan.split)))


@given(plan=plans(), windows_per_shard=st.integers(1, 5))
def test_no_shard_mixes_splits(plan: WindowPlan, windows_per_shard: int) -> None:
    for run in shard_runs(plan, windows_per_shard):
        assert set(plan.split[run.first : run.first + run.windows].tolist()) == {SPLITS.index(run.split)}


@given(plan=plans(), windows_per_shard=st.integers(1, 5))
def test_shards_hold_no_more_windows_than_asked_for_and_have_names_of_their_own(
    plan: WindowPlan, windows_per_shard: int
) -> None:
    runs = shard_runs(plan, windows_per_shard)
    assert all(1 <= run.windows <= windows_per_shard for run in runs)
    assert len({run.file for run in runs}) == len(runs)


# -- the plan on disk -------------------------------------------------------------------------------------------------


def windows_of(out: Path, backbone: Path, texts: Path, **changes: Any) -> DocumentWindows:
    counts = changes.pop("windows", WindowCounts(4, 2))
    sources = changes.pop("sources", [own(texts)])
    return DocumentWindows(str(out), sources, counts, str(backbone), **{"window": WINDOW} | changes)


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
