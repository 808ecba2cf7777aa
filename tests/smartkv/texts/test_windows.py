"""The window plan: which windows there are, and its file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.shards.shard_file import DamagedFile, write_shard
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import PLAN, WindowPlan, check_counts, plan_windows, read_plan
from tests.lightning_fixtures import WINDOW, prose, write_texts
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


def test_the_plan_records_how_many_packages_installed_code_is_from() -> None:
    plan = plan_of([SourceConfig("code")], {"validation": 2})
    windows = {"train": 0, "validation": 2, "test": 0}
    assert plan.sources[0]["packages"] > 50
    assert plan.sources == [
        {"name": "code", "origin": "installed", "packages": plan.sources[0]["packages"], "windows": windows}
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
    lines: list[str] = []
    plan_of([own(write_texts(tmp_path))], {"train": 1000}, say=lines.append)
    assert any("'mine' has only 27 of 1000 train windows" in line for line in lines)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_empty_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "empty.txt").write_text("")
    message = rf"no train window of {WINDOW} tokens \('mine': 1 document of split train have 0 tokens\)"
    with pytest.raises(SmartKVError, match=message):
        plan_of([own(tmp_path)], {"train": 1})


def test_a_split_that_a_hash_left_empty_is_told_from_short_texts(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(prose(200, seed=0))
    lines: list[str] = []
    message = r"no validation window of .* divides its 3 documents into train 3, validation 0, test 0: .*subfolders"
    with pytest.raises(SmartKVError, match=message):
        plan_of([own(tmp_path)], {"train": 1, "validation": 1}, say=lines.append)
    assert any("only 0 of 1 validation windows" in line and "validation 0" in line for line in lines)
    assert len(plan_of([own(tmp_path)], {"train": 1}).tokens) == 1


def test_a_source_that_only_another_split_s_documents_has_is_said_beside_others(tmp_path: Path) -> None:
    lines: list[str] = []
    train = write_texts(tmp_path / "train only", splits=["train"])
    plan = plan_of([own(train), own(write_texts(tmp_path / "both"), "both")], {"validation": 2}, say=lines.append)
    assert len(plan.tokens) == 1
    assert any(
        "'mine' has only 0 of 1 validation windows" in line and "a subfolder 'validation'" in line for line in lines
    )


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


@pytest.mark.parametrize("count", [2.0, "2", True, None])
def test_counts_that_are_no_whole_numbers_are_refused(count: Any) -> None:
    check_counts({"train": 2, "validation": 0})
    with pytest.raises(SmartKVError, match="windows must be a whole number for each split"):
        check_counts({"train": count, "validation": 0})


# -- a plan -----------------------------------------------------------------------------------------------------------


def small_plan() -> WindowPlan:
    """Two training windows and one of the test, of four tokens each."""
    document = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]], dtype=torch.int32)
    tokens = torch.arange(12, dtype=torch.int32).view(3, 4)
    sources = [{"name": "a", "origin": "local", "windows": {"train": 2, "validation": 0, "test": 1}}]
    return WindowPlan(
        tokens, document, torch.tensor([0, 0, 2], dtype=torch.int32), ["a/0", "a/1", "a/2", "a/3"], sources
    )


def test_a_split_has_its_windows_and_the_documents_they_begin_with() -> None:
    plan = small_plan()
    assert plan.of_split("train").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert plan.documents_of_split("train") == [0, 2] and plan.documents_of_split("test") == [3]
    assert plan.of_split("validation").shape == (0, 4) and plan.documents_of_split("validation") == []


def test_the_digest_changes_with_any_token_and_with_nothing_else() -> None:
    plan, other = small_plan(), small_plan()
    other.documents.append("a/4")
    assert plan.digest == other.digest
    other.tokens[2, 3] += 1
    assert plan.digest != other.digest


def write_plan(folder: Path, plan: WindowPlan) -> Path:
    """The file that a harvest writes."""
    tensors = {"tokens": plan.tokens, "document": plan.document, "split": plan.split}
    write_shard(folder / PLAN, tensors, {"arguments": {}, "documents": plan.documents, "sources": plan.sources})
    return folder / PLAN


def test_a_written_plan_reads_back(tmp_path: Path) -> None:
    plan = small_plan()
    write_plan(tmp_path, plan)
    read = read_plan(tmp_path)
    for name in ("tokens", "document", "split"):
        assert torch.equal(getattr(read, name), getattr(plan, name)) and getattr(read, name).dtype == torch.int32
    assert (read.documents, read.sources, read.digest) == (plan.documents, plan.sources, plan.digest)


def test_a_plan_that_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=PLAN):
        read_plan(tmp_path)
    path = write_plan(tmp_path, small_plan())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedFile, match=PLAN):
        read_plan(tmp_path)
