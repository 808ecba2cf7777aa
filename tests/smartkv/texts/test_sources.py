"""Named text sources: splits by document, and where a source is taken from."""

import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.documents import Document
from smartkv.texts.sources import KNOWN, Source, SourceConfig, resolve_source
from tests.lightning_fixtures import prose

RECORDS = {
    "gsm8k/train.jsonl": [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(60)],
    "gsm8k/test.jsonl": [{"question": f"evaluated {i}?", "answer": f"secret {i}"} for i in range(20)],
    "math/math500.jsonl": [{"unique_id": f"test/algebra/{i}.json", "problem": f"p{i}", "solution": f"s{i}"}
                           for i in range(60)],
    "math/aime24.jsonl": [{"id": i, "problem": f"p{i}", "solution": f"s{i}"} for i in range(60)],
    "webtext/c4_sample.jsonl": [{"prefix": f"page {i} ", "gold_completion": "goes on"} for i in range(60)],
    "webtext/fineweb_edu.jsonl": [{"id": f"<urn:{i}>", "text": f"lesson {i}"} for i in range(60)],
}  # fmt: skip


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a data folder nor the hub."""
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def quiet(_: str) -> None:
    pass


def by_split(source: Source) -> dict[str, list[Document]]:
    return {split: list(source.documents(split)) for split in SPLITS}


def everything(source: Source) -> list[Document]:
    return [document for documents in by_split(source).values() for document in documents]


def ids(documents: list[Document]) -> set[str]:
    return {document.id for document in documents}


def assert_disjoint(found: dict[str, list[Document]]) -> None:
    assert not ids(found["train"]) & ids(found["validation"])
    assert not ids(found["train"]) & ids(found["test"])
    assert not ids(found["validation"]) & ids(found["test"])


# -- splits of the named sources --------------------------------------------------------------------------------------


def test_books_keep_the_splits_of_their_folders(local_data: Path) -> None:
    found = by_split(resolve_source(SourceConfig("pg19"), quiet))
    assert {split: ids(documents) for split, documents in found.items()} == {
        split: {f"{split}-book-{number}" for number in range(3)} for split in SPLITS
    }


def test_a_book_is_read_as_it_is_in_its_file(local_data: Path) -> None:
    book = next(resolve_source(SourceConfig("pg19"), quiet).documents("validation"))
    assert book.text == (local_data / "books" / "validation" / f"{book.id}.txt").read_text()


@pytest.mark.parametrize("name", ["math500", "aime24", "c4"])
def test_splits_by_id_are_disjoint(local_data: Path, name: str) -> None:
    assert_disjoint(by_split(resolve_source(SourceConfig(name), quiet)))


@pytest.mark.parametrize("name", ["math500", "aime24", "c4"])
def test_splits_by_id_cover_every_record(local_data: Path, name: str) -> None:
    assert len(everything(resolve_source(SourceConfig(name), quiet))) == 60


@pytest.mark.parametrize("name", ["math500", "aime24", "c4"])
def test_splits_by_id_leave_no_split_empty(local_data: Path, name: str) -> None:
    assert all(by_split(resolve_source(SourceConfig(name), quiet)).values())


def test_math_problems_are_split_by_their_id_not_by_their_place(local_data: Path) -> None:
    before = by_split(resolve_source(SourceConfig("math500"), quiet))
    write_jsonl(local_data / "math/math500.jsonl", RECORDS["math/math500.jsonl"][::-1])
    after = by_split(resolve_source(SourceConfig("math500"), quiet))
    assert {split: ids(documents) for split, documents in after.items()} == {
        split: ids(documents) for split, documents in before.items()
    }


def test_gsm8k_train_file_is_divided_into_train_and_validation_without_overlap(local_data: Path) -> None:
    found = by_split(resolve_source(SourceConfig("gsm8k"), quiet))
    assert found["train"] and found["validation"]
    assert_disjoint(found)


def test_gsm8k_test_problems_are_only_in_split_test(local_data: Path) -> None:
    found = by_split(resolve_source(SourceConfig("gsm8k"), quiet))
    assert len(found["test"]) == 20
    assert all("evaluated" in document.text for document in found["test"])
    assert not any("evaluated" in document.text for document in found["train"] + found["validation"])


def test_a_problem_is_rendered_with_its_solution(local_data: Path) -> None:
    problem = next(resolve_source(SourceConfig("gsm8k"), quiet).documents("test"))
    assert problem.text == "Question: evaluated 0?\nAnswer: secret 0"


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "builtin"])
def test_documents_start_anew_at_each_call(local_data: Path, name: str) -> None:
    source = resolve_source(SourceConfig(name), quiet)
    assert list(source.documents("train")) == list(source.documents("train"))


@pytest.mark.parametrize("name", ["pg19", "gsm8k", "math500", "aime24", "c4"])
def test_ids_are_unique_within_a_source(local_data: Path, name: str) -> None:
    documents = everything(resolve_source(SourceConfig(name), quiet))
    assert len(ids(documents)) == len(documents)


# -- the prose that Python ships --------------------------------------------------------------------------------------


def test_builtin_splits_are_disjoint_and_none_is_empty() -> None:
    found = by_split(resolve_source(SourceConfig("builtin"), quiet))
    assert all(found.values())
    assert_disjoint(found)


def test_builtin_has_about_460_000_characters() -> None:
    documents = everything(resolve_source(SourceConfig("builtin"), quiet))
    assert sum(len(document.text) for document in documents) == pytest.approx(460_000, rel=0.1)


# -- where a source is taken from -------------------------------------------------------------------------------------


def test_the_origin_that_is_used_is_said(local_data: Path) -> None:
    said: list[str] = []
    assert resolve_source(SourceConfig("gsm8k"), said.append).origin == "local"
    assert said == ["source 'gsm8k': local"]


def test_the_first_origin_that_can_be_had_is_used(local_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_source(SourceConfig("gsm8k", origins=["hub", "local"]), quiet).origin == "local"


def test_a_source_that_cannot_be_had_stops_and_names_each_origin_tried(no_data: None) -> None:
    with pytest.raises(SmartKVError, match=r"pg19.*local: \$SMARTKV_DATA is not set.*hub: HF_HUB_OFFLINE is set"):
        resolve_source(SourceConfig("pg19"), quiet)


def test_a_data_folder_without_the_source_is_named(
    no_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    with pytest.raises(SmartKVError, match=str(tmp_path / "books" / "train")):
        resolve_source(SourceConfig("pg19"), quiet)


def test_builtin_prose_in_place_of_a_source_is_said_loudly(no_data: None) -> None:
    said: list[str] = []
    resolve_source(SourceConfig("pg19", origins=["local", "hub", "builtin"]), said.append)
    assert len(said) == 1
    assert "'pg19' CANNOT BE HAD" in said[0] and "HF_HUB_OFFLINE" in said[0]


def test_builtin_prose_in_place_of_a_source_is_named_builtin_with_the_source_s_share(no_data: None) -> None:
    source = resolve_source(SourceConfig("pg19", weight=0.7, origins=["local", "builtin"]), quiet)
    assert (source.name, source.origin, source.weight) == ("builtin", "builtin", 0.7)


@pytest.mark.parametrize("name", ["pg19", "c4"])
def test_an_offline_hub_answers_quickly(no_data: None, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(SmartKVError):
        resolve_source(SourceConfig(name, origins=["hub"]), quiet)
    assert time.monotonic() - start < 5


def test_a_hub_that_does_not_answer_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(SmartKVError, match="emozilla/pg19 does not answer"):
        resolve_source(SourceConfig("pg19", origins=["hub"]), quiet)
    assert time.monotonic() - start < 5


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_refused_with_those_there_are() -> None:
    with pytest.raises(SmartKVError, match=r"'pg20' is unknown: expected pg19, gsm8k"):
        resolve_source(SourceConfig("pg20"), quiet)


def test_an_unknown_origin_is_refused_with_those_there_are() -> None:
    with pytest.raises(SmartKVError, match=r"'pg19': origin 'disk' is unknown: expected some of local, hub, builtin"):
        resolve_source(SourceConfig("pg19", origins=["disk"]), quiet)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_that_is_not_above_zero_is_refused(weight: float) -> None:
    with pytest.raises(SmartKVError, match="'builtin': weight"):
        resolve_source(SourceConfig("builtin", weight=weight), quiet)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=f"'mine': path {tmp_path / 'gone'}"):
        resolve_source(SourceConfig("mine", path=str(tmp_path / "gone")), quiet)


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
    found = by_split(own(mixed))
    assert all(found.values())
    assert_disjoint(found)


def test_an_own_folder_without_splits_loses_no_document(mixed: Path) -> None:
    texts = [document.text for document in everything(own(mixed))]
    expected = [f"record {i}" for i in range(40)] + [f"file {i}" for i in range(40)]
    assert sorted(texts) == sorted(expected)


def test_an_own_folder_is_read_by_text_file_and_by_line(mixed: Path) -> None:
    found = {document.id: document.text for document in everything(own(mixed))}
    assert (found["text3"], found["lines/3"]) == ("file 3", "record 3")


def test_an_own_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train" / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "b.txt").write_text("three")
    found = by_split(own(tmp_path))
    assert {split: [d.text for d in documents] for split, documents in found.items()} == {
        "train": ["one", "two"],
        "validation": ["three"],
        "test": [],
    }


def test_an_own_file_of_records_is_divided_and_covered(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [{"text": f"record {i}"} for i in range(40)])
    found = by_split(own(path))
    assert_disjoint(found)
    assert sum(len(documents) for documents in found.values()) == 40


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


@pytest.mark.parametrize(
    ("name", "file", "record"),
    [
        ("gsm8k", "gsm8k/train.jsonl", {"question": "and the answer?"}),
        ("math500", "math/math500.jsonl", {"unique_id": "a", "problem": "and the solution?"}),
        ("math500", "math/math500.jsonl", {"problem": "who am I?", "solution": "nobody knows"}),
        ("aime24", "math/aime24.jsonl", {"problem": "who am I?", "solution": "nobody knows"}),
        ("c4", "webtext/c4_sample.jsonl", {"url": "and the text?"}),
    ],
    ids=["gsm8k answer", "math500 solution", "math500 id", "aime24 id", "c4 text"],
)
def test_a_local_record_that_lacks_a_field_is_told_in_one_line(
    local_data: Path, name: str, file: str, record: dict[str, Any]
) -> None:
    write_jsonl(local_data / file, [record])
    with pytest.raises(SmartKVError, match=Path(file).name):
        by_split(resolve_source(SourceConfig(name), quiet))
