"""Files of code, and the lines that can be held out."""

from pathlib import Path

import pytest

from eval.tasks.code_files import code_documents, held_lines, package_of, related_first
from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document, split_of
from smartkv.texts.sources import SourceConfig

CODE = '''"""What stands in a docstring = is no line."""
import collections.abc as nothing
from typing import Any


def first(value):
    """another_name = docstring"""
    # a_comment = of_some_length
    result = value.something(1, 2)
    x = 1
    longer = call(
        one_argument,
    )
    return result.together(longer)
'''


def names(path: str | None, split: str) -> list[str]:
    return [each.id for each in code_documents(SourceConfig("code", path=path), split, lambda _: None)]


def test_only_whole_statements_with_names_are_held_out() -> None:
    lines = CODE.split("\n")
    held = [lines[number].strip() for number in held_lines(Document("p/a.py", CODE))]
    assert held == ["result = value.something(1, 2)", "return result.together(longer)"]
    assert held_lines(Document("p/a.py", "def broken(:\n    value = something_else()\n")) == []
    other = "// comment of some length\nlet something = other(1);\n\n}\n"
    assert held_lines(Document("p/a.js", other)) == [1]


def test_a_package_is_in_one_split(tmp_path: Path) -> None:
    for package in map(str, range(12)):
        for file in ("a.py", "deep/b.py", "tests/c.py", "data.txt"):
            path = tmp_path / package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x = 1\n")
    found = {split: names(str(tmp_path), split) for split in ("train", "test")}
    assert found["train"] and found["test"]
    for split, files in found.items():
        packages = {package_of(name) for name in files}
        assert {split_of(package) for package in packages} == {split}
        assert sorted(files) == sorted(f"{package}/{file}" for package in packages for file in ("a.py", "deep/b.py"))


def test_the_standard_library_is_read_without_a_path() -> None:
    found = names(None, "test")
    assert found and not any("/test/" in name or "site-packages" in name for name in found)


def test_a_folder_without_code_is_told(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="no folder"):
        names(str(tmp_path / "missing"), "test")
    with pytest.raises(SmartKVError, match="is in split test"):
        names(str(tmp_path), "test")


def test_files_that_are_imported_come_first() -> None:
    document = Document("p/a.py", "from p import helper\nimport p.other\n")
    others = [Document(f"p/{stem}.py", "") for stem in ("zeta", "helper", "alpha", "other")]
    assert [file.id for file in related_first(document, others)] == [
        "p/helper.py",
        "p/other.py",
        "p/zeta.py",
        "p/alpha.py",
    ]
