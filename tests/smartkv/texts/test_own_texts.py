"""Which files of a user's folder are read, and what is said of the others."""

import gzip
import os
from pathlib import Path

import pytest

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.texts.own_texts import OwnTexts
from smartkv.texts.sources import SourceConfig, resolve_source
from tests.smartkv.texts.fixtures import quiet


def fill(folder: Path, *names: str) -> Path:
    """A folder of files whose text is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def texts(folder: Path) -> dict[str, str]:
    """The text of each document of all splits, by id."""
    own = OwnTexts.find(folder)
    return {document.id: document.text for split in SPLITS for document in own.documents(split)}


def test_texts_markdown_capitals_and_compressed_files_are_read(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.TXT", "c.md", "sub/d.Md", "a.b.txt", "e.jsonl.txt")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"f.txt.gz"))
    (tmp_path / "g.JSONL").write_text('{"text": "g.JSONL"}')
    assert texts(tmp_path) == {
        "a": "a.txt", "b.TXT": "b.TXT", "c.md": "c.md", "sub/d.Md": "sub/d.Md", "a.b": "a.b.txt",
        "e.jsonl": "e.jsonl.txt", "f.txt.gz": "f.txt.gz", "g.JSONL/0": "g.JSONL",
    }  # fmt: skip


def test_files_that_differ_in_their_ending_alone_are_documents_of_their_own(tmp_path: Path) -> None:
    assert len(texts(fill(tmp_path, "a.txt", "a.md", "a.TXT"))) == 3


def test_other_files_are_counted_by_kind_and_said(tmp_path: Path) -> None:
    hidden = ("._a.txt", ".git/b.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt", ".a.txt.swp")
    fill(tmp_path, "a.txt", "a.txt~", "#a.txt#", "~$a.txt", "a.pdf", "b.pdf", "a.txt.bak", "LICENSE", *hidden)
    lines: list[str] = []
    source = resolve_source(SourceConfig("mine", path=str(tmp_path)), lines.append)
    assert [document.id for split in SPLITS for document in source.documents(split)] == ["a"]
    assert lines == [
        f"source 'mine': 1 file in {tmp_path}; "
        "not read: 1 .bak, 2 .pdf, 3 an editor's copy, 5 hidden, 1 without an ending"
    ]


def test_files_beside_split_folders_are_not_read_and_said(tmp_path: Path) -> None:
    own = OwnTexts.find(fill(tmp_path, "train/a.txt", "validation/b.txt", "README.md", "dev/c.txt"))
    assert [d.id for d in own.documents("train")] == ["a"] and not list(own.documents("test"))
    assert own.skipped_in_words == "2 outside of train, validation"
    assert own.why_none("test").endswith("has no text in a subfolder 'test', only in train, validation")


def test_folders_behind_links_are_read_once_under_their_own_name(tmp_path: Path) -> None:
    elsewhere, folder = fill(tmp_path / "elsewhere", "a.txt"), fill(tmp_path / "mine", "real/b.txt")
    (folder / "another").symlink_to(folder / "real")
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    assert texts(folder) == {"link/a": "a.txt", "real/b": "real/b.txt"}
    (tmp_path / "front").symlink_to(folder)
    assert texts(tmp_path / "front") == {"link/a": "a.txt", "real/b": "real/b.txt"}


def test_split_folders_may_be_links(tmp_path: Path) -> None:
    elsewhere, folder = fill(tmp_path / "elsewhere", "a.txt"), fill(tmp_path / "mine", "validation/b.txt")
    (folder / "train").symlink_to(elsewhere)
    assert [document.id for document in OwnTexts.find(folder).documents("train")] == ["a"]


@pytest.mark.parametrize("name", ["one.md", ".one.txt", "one.TXT"])
def test_a_single_file_is_read_whatever_its_name_begins_with(name: str, tmp_path: Path) -> None:
    assert list(texts(fill(tmp_path, name) / name).values()) == [name]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"holds no file: expected \.txt, \.md or \.jsonl \(each also with \.gz\)"),
        (["a.pdf", "b.html", "c.html"], r"holds only files that are not read \(2 \.html, 1 \.pdf\): expected \.txt"),
        (["train/a.pdf"], r"holds only files that are not read \(1 \.pdf\)"),
    ],
)
def test_a_folder_without_text_is_refused_with_what_it_holds(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=rf"source 'mine': {tmp_path} {message}"):
        resolve_source(SourceConfig("mine", path=str(fill(tmp_path, *names))), quiet)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"book\.pdf is no file of text: expected \.txt"):
        OwnTexts.find(fill(tmp_path, "book.pdf") / "book.pdf")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read anything
    with pytest.raises(SmartKVError, match=f"{tmp_path} cannot be read: Permission denied"):
        OwnTexts.find(tmp_path)


def test_a_name_that_is_no_unicode_has_a_split_too(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    assert list(texts(tmp_path).values()) == ["x"]


def test_how_few_files_are_divided_is_told(tmp_path: Path) -> None:
    own = OwnTexts.find(fill(tmp_path, "a.txt", "b.txt", "c.txt"))
    assert own.why_none("validation").startswith(
        "a hash of each name divides its 3 documents into train 3, validation 0, test 0: give more documents, or sub"
    )


# -- a folder of code -------------------------------------------------------------------------------------------------


def code(folder: Path) -> OwnTexts:
    return OwnTexts.find(folder, code=True)


def ids_by_split(own: OwnTexts) -> dict[str, list[str]]:
    return {split: [document.id for document in own.documents(split)] for split in SPLITS}


def test_source_files_of_many_languages_are_read_as_code_and_others_said(tmp_path: Path) -> None:
    read = ["a.py", "b.js", "c.ts", "D.java", "e.c", "e.h", "f.cpp", "g.rs", "h.go", "README.md"]
    own = code(fill(tmp_path, *read, "data.jsonl", "notes.txt", "logo.png", ".hidden.py"))
    assert sorted(name for names in ids_by_split(own).values() for name in names) == sorted(read)
    assert own.skipped_in_words == "1 .jsonl, 1 .png, 1 .txt, 1 hidden"


def test_environments_and_caches_in_a_folder_of_code_are_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fill(tmp_path, "a.py", "env_made_by_hand/pyvenv.cfg", "web/node_modules/b.js", "web/c.js")
    fill(tmp_path, ".venv/d.py", ".git/e.py", "__pycache__/f.py", "web/__pycache__/g.py", "env_made_by_hand/h.py")
    entered, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: entered.append(Path(folder).name) or scan(folder))
    found = code(own)
    assert sorted(name for names in ids_by_split(found).values() for name in names) == ["a.py", "web/c.js"]
    assert found.skipped_in_words == "1 .git/, 1 .venv/, 2 __pycache__/, 1 env_made_by_hand/, 1 node_modules/"
    assert set(entered) == {tmp_path.name, "web"}


def test_generated_minified_and_foreign_code_is_counted_in_place_of_stopping_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.min.js").write_text("a" * 3000)
    (tmp_path / "b_pb2.py").write_text("# Generated by the protocol buffer compiler.\n")
    (tmp_path / "c.c").write_bytes(b"/* caf\xe9 */")
    own = code(fill(tmp_path, "d.py"))
    assert own.count == 1
    assert own.skipped_in_words == "1 generated, 1 not in UTF-8, 1 of data or minified"


def test_code_of_one_subfolder_is_in_one_split_and_subfolders_take_turns(tmp_path: Path) -> None:
    own = code(fill(tmp_path, *(f"p{number}/src/f{file}.py" for number in range(40) for file in range(3))))
    found = ids_by_split(own)
    projects = {split: {name.split("/")[0] for name in names} for split, names in found.items()}
    assert all(found.values()) and sum(map(len, found.values())) == 120
    assert sum(map(len, projects.values())) == 40
    for split, names in found.items():
        assert {name.split("/")[0] for name in names[: len(projects[split])]} == projects[split]


def test_code_in_split_folders_keeps_them(tmp_path: Path) -> None:
    own = code(fill(tmp_path, "train/one/a.py", "train/two/b.py", "test/c.py", "setup.py"))
    found = ids_by_split(own)
    assert {split: sorted(names) for split, names in found.items()} == {
        "train": ["one/a.py", "two/b.py"],
        "validation": [],
        "test": ["c.py"],
    }
    assert own.skipped_in_words == "1 outside of train, test"


def test_a_project_s_folder_of_tests_is_no_split(tmp_path: Path) -> None:
    own = code(fill(tmp_path, "src/a.py", "test/b.py"))
    assert sorted(name for names in ids_by_split(own).values() for name in names) == ["src/a.py", "test/b.py"]


def test_a_single_file_of_code_or_of_records_is_read(tmp_path: Path) -> None:
    fill(tmp_path, "a.py")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for name, count in {"a.py": 1, "b.jsonl": 2}.items():
        assert sum(map(len, ids_by_split(code(tmp_path / name)).values())) == count
    with pytest.raises(SmartKVError, match=r"book\.pdf is no file of code: expected source files such as \.py"):
        code(fill(tmp_path, "book.pdf") / "book.pdf")


def test_a_folder_without_code_and_one_of_too_few_subfolders_are_told(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"holds only files that are not read \(1 \.pdf\): expected source files"):
        code(fill(tmp_path / "papers", "a.pdf"))
    own = code(fill(tmp_path / "project", "src/a.py", "src/b.py"))
    assert own.why_none("validation").startswith("a hash of each subfolder divides its 2 documents into train ")
    assert "give more subfolders, or subfolders train, validation, test" in own.why_none("validation")
