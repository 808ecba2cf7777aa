"""Where documents are read from: a user's own files, the prose that Python ships, the hub."""

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.known_sources import KNOWN
from smartkv.texts.origins import hub_documents
from smartkv.texts.sources import Source, SourceConfig, resolve_source
from tests.smartkv.texts.fixtures import assert_disjoint, by_split, everything, ids, quiet, write_jsonl

# -- the prose that Python ships --------------------------------------------------------------------------------------


def test_builtin_splits_are_disjoint_and_none_is_empty() -> None:
    documents_by_split = by_split(resolve_source(SourceConfig("builtin"), quiet))
    assert all(documents_by_split.values())
    assert_disjoint(documents_by_split)


def test_builtin_has_about_460_000_characters() -> None:
    documents = everything(resolve_source(SourceConfig("builtin"), quiet))
    assert sum(len(document.text) for document in documents) == pytest.approx(460_000, rel=0.1)


# -- a folder or file of one's own ------------------------------------------------------------------------------------


def own(path: Path) -> Source:
    return resolve_source(SourceConfig("mine", path=str(path)), quiet)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """40 texts and a file of 40 records, without split subfolders."""
    folder = tmp_path / "mixed"
    write_jsonl(folder / "lines.jsonl", [{"text": f"record {i}"} for i in range(40)])
    for number in range(40):
        (folder / f"text{number}.txt").write_text(f"file {number}")
    return folder


def test_an_own_folder_without_splits_is_divided_without_overlap(mixed: Path) -> None:
    documents_by_split = by_split(own(mixed))
    assert all(documents_by_split.values())
    assert_disjoint(documents_by_split)


def test_an_own_folder_without_splits_loses_no_document(mixed: Path) -> None:
    texts = [document.text for document in everything(own(mixed))]
    expected = [f"record {i}" for i in range(40)] + [f"file {i}" for i in range(40)]
    assert sorted(texts) == sorted(expected)


def test_an_own_folder_is_read_by_text_file_and_by_line(mixed: Path) -> None:
    texts = {document.id: document.text for document in everything(own(mixed))}
    assert (texts["text3"], texts["lines/3"]) == ("file 3", "record 3")


def test_an_own_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train" / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "b.txt").write_text("three")
    documents_by_split = by_split(own(tmp_path))
    assert {split: [d.text for d in documents] for split, documents in documents_by_split.items()} == {
        "train": ["one", "two"],
        "validation": ["three"],
        "test": [],
    }


def test_an_own_file_of_records_is_divided_and_covered(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [{"text": f"record {i}"} for i in range(40)])
    documents_by_split = by_split(own(path))
    assert_disjoint(documents_by_split)
    assert sum(len(documents) for documents in documents_by_split.values()) == 40


def test_ids_of_an_own_folder_are_unique_although_files_in_subfolders_share_a_name(tmp_path: Path) -> None:
    for author in ("austen", "bronte"):
        (tmp_path / "train" / author).mkdir(parents=True)
        (tmp_path / "train" / author / "letters.txt").write_text(f"letters of {author}")
    documents = list(own(tmp_path).documents("train"))
    assert [d.text for d in documents] == ["letters of austen", "letters of bronte"]
    assert len(ids(documents)) == 2


def test_a_broken_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "cut off\n')
    with pytest.raises(SmartKVError, match=r"broken\.jsonl, line 3: not JSON"):
        everything(own(path))


@pytest.mark.parametrize("record", [{"body": "x"}, {"text": 3}, {"text": None}])
def test_a_record_without_text_is_named_with_its_number(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "odd.jsonl", [{"text": "fine"}, record])
    with pytest.raises(SmartKVError, match=r"odd\.jsonl, line 2: .*'text'"):
        everything(own(path))


def test_a_line_that_is_json_but_no_record_is_told_in_one_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "list.jsonl", [{"text": "fine"}, ["a", "b"]])
    with pytest.raises(SmartKVError, match=r"list\.jsonl"):
        everything(own(path))


def test_a_jsonl_that_is_not_utf8_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(SmartKVError, match=r"latin\.jsonl"):
        everything(own(path))


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A hub that has 60 problems in each split of each data set; the list fills with what it is asked for."""
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(repository: str, configuration: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((repository, configuration, split))
        return [{"question": f"{split} {number}?", "answer": str(number)} for number in range(60)]

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_two_of_our_splits_that_share_one_of_the_hub_divide_it_by_id(hub: list[tuple[str, str | None, str]]) -> None:
    documents = hub_documents(KNOWN["gsm8k"])
    documents_by_split = {split: list(documents(split)) for split in SPLITS}
    assert hub == [("openai/gsm8k", "main", split) for split in ("train", "train", "test")]
    assert_disjoint(documents_by_split)
    assert (
        len(documents_by_split["train"]) > len(documents_by_split["validation"]) > 0
        and len(documents_by_split["test"]) == 60
    )
    assert documents_by_split["test"][3].text == "Question: test 3?\nAnswer: 3"


def test_a_record_of_the_hub_that_lacks_a_field_is_named_with_its_number(
    hub: list[tuple[str, str | None, str]],
) -> None:
    with pytest.raises(SmartKVError, match="test, record 1: the field 'unique_id' is missing"):
        list(hub_documents(KNOWN["math500"])("train"))
