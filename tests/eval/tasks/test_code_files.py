"""Files of code, and the lines that can be held out."""

from eval.tasks.code_files import held_lines, related_first
from smartkv.texts.documents import Document

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


def test_only_whole_statements_with_names_are_held_out() -> None:
    lines = CODE.split("\n")
    held = [lines[number].strip() for number in held_lines(Document("p/a.py", CODE))]
    assert held == ["result = value.something(1, 2)", "return result.together(longer)"]
    assert held_lines(Document("p/a.py", "def broken(:\n    value = something_else()\n")) == []
    other = "// comment of some length\nlet something = other(1);\n\n}\n"
    assert held_lines(Document("p/a.js", other)) == [1]


def test_files_that_are_imported_come_first() -> None:
    document = Document("p/a.py", "from p import helper\nimport p.other\n")
    others = [Document(f"p/{stem}.py", "") for stem in ("zeta", "helper", "alpha", "other")]
    assert [file.id for file in related_first(document, others)] == [
        "p/helper.py",
        "p/other.py",
        "p/zeta.py",
        "p/alpha.py",
    ]
