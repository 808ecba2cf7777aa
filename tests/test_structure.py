"""The house: who imports whom, docstrings, length of files."""

import ast
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "smartkv").rglob("*.py"))
TRAINER_SIDE = {"lightning", "pytorch_lightning", "callbacks", "datamodules", "eval", "lightning_modules", "main"}
NOT_OURS = {"build", "dist", "runs", "lightning_logs"}
LONGEST = 350


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> set[str]:
    """The first part of every module imported anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def test_every_module_of_the_library_can_be_imported(fresh_interpreter: dict[str, Any]) -> None:
    files = {path.relative_to(ROOT).with_suffix("") for path in LIBRARY}
    expected = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"smartkv"}
    if find_spec("kvpress") is None:
        expected.remove("smartkv.press")  # says which extra it needs: see test_press.py
    assert set(fresh_interpreter["imported"]) == expected


def test_importing_the_library_loads_no_lightning_and_nothing_of_the_trainers_side(
    fresh_interpreter: dict[str, Any],
) -> None:
    assert "smartkv" in fresh_interpreter["roots"]
    assert TRAINER_SIDE.isdisjoint(fresh_interpreter["roots"])


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_no_line_of_the_library_imports_the_trainers_side(path: Path) -> None:
    assert imported(ast.parse(path.read_text())) & TRAINER_SIDE == set()


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_every_public_function_and_class_of_the_library_has_a_docstring(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds) and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_python_file_is_longer_than_350_lines() -> None:
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.startswith(".")]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    assert set(LIBRARY) < set(files)
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
