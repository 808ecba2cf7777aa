"""What the library and the README's Python import is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.markdown import blocks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}  # names that differ from those of their modules


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Packages that these nodes import, by the names under which they are installed."""
    names = set[str]()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return {PACKAGES.get(name, name) for name in names - set(sys.stdlib_module_names) - {"smartkv"}}


LIBRARY = sorted((ROOT / "smartkv").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_imports_is_installed_with_it(path: Path) -> None:
    """On import a module needs the library's dependencies, or those of its extra; later any extra."""
    tree = ast.parse(path.read_text())
    extra = EXTRAS["kvpress"] if path.name == "press.py" else EXTRAS["triton"] if path.parent.name == "kernels" else []
    functions = {id(node) for body in ast.walk(tree) if isinstance(body, ast.FunctionDef) for node in ast.walk(body)}
    at_once = imported(node for node in ast.walk(tree) if id(node) not in functions)
    assert at_once <= declared(PROJECT["dependencies"] + extra)
    assert imported(ast.walk(tree)) <= declared([*PROJECT["dependencies"], *chain(*EXTRAS.values())])


def test_the_readmes_python_needs_what_its_install_lines_name() -> None:
    text = (ROOT / "README.md").read_text()
    extras = set(re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", text))
    assert extras <= set(EXTRAS) and "pip install .  " in text
    snippets = [ast.parse(snippet) for snippet in blocks(ROOT / "README.md", "python")]
    assert snippets
    assert set().union(*(imported(ast.walk(tree)) for tree in snippets)) <= declared(PROJECT["dependencies"])
    if "device_map" in text:  # transformers asks for accelerate
        assert any("accelerate" in declared(EXTRAS[extra]) for extra in extras)
