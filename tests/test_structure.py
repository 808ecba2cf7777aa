"""The layout: which packages there are, who imports whom, docstrings, length of files, and a test module a module."""

import ast
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.imports import MODULES, ROOT, by_folder, circle, import_graph, imported_names, module_name

LIBRARY = sorted((ROOT / "smartkv").rglob("*.py"))
OUTSIDE = {"lightning", "pytorch_lightning", "callbacks", "datamodules", "eval", "lightning_modules", "main"}
NOT_OURS = {"build", "dist", "runs", "lightning_logs"}
LONGEST = 350
# each may import those before it
FLOORS = [
    "errors",
    "io",
    "models",
    "quantization",
    "labels",
    "shards",
    "texts",
    "gates",
    "policies",
    "kernels",
    "cache",
    "metrics",
    "distillation",
    "sparsity",
    "baselines",
]
EVAL = ["common", "contenders", "eviction", "tasks", "gates", "attention", "speed", "quantization", "chat", "gpu"]
PACKAGES = {
    *(f"smartkv.{name}" for name in FLOORS if name != "errors"),
    *(f"eval.{name}" for name in EVAL),
    "smartkv.experiments",
}
OLD_PATHS = {  # what version 0.1 called them: each only imports from the new place
    "smartkv.budgets",
    "smartkv.objectives",
    "smartkv.sparsity.mask_sources",
    "smartkv.sparsity.schedule",
}
WITHOUT_TESTS = {  # modules without a test module of their name, and why
    "smartkv.policies.lifetimes": "two constants",
    "smartkv.kernels.launching": "the tests of the kernels have it",
    "smartkv.cache.cache_edits": "tests/smartkv/cache/test_pins.py and test_rollback.py have them",
    "smartkv.cache.key_edits": "tests/smartkv/cache/test_pins.py and test_rollback.py have them",
    "smartkv.cache.layer_limit": "tests/smartkv/cache/test_cache_budget.py and test_rollback.py have it",
    "eval.gpu.__main__": "tests/eval/gpu/test_check.py runs it",
    "eval.__main__": "tests/eval/test_commands.py types its commands",
} | dict.fromkeys(OLD_PATHS, "imports alone: tests/compatibility has them")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_each_package_says_in_a_line_what_lives_there(package: str) -> None:
    assert MODULES[package].name == "__init__.py"
    said = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert said and "\n" not in said


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph()
    files = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    assert circle({name: imports & files for name, imports in graph.items() if name in files}) == []


def test_no_folder_imports_itself_through_others() -> None:
    assert circle(by_folder(import_graph(), PACKAGES)) == []


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_of_the_library_imports_only_what_stands_before_it(folder: str) -> None:
    rooms = by_folder(import_graph(), PACKAGES)
    below = {f"smartkv.{name}" for name in FLOORS[: FLOORS.index(folder)]}
    assert rooms[f"smartkv.{folder}"] <= below


def test_the_folders_of_a_trainer_stand_on_each_other_in_one_direction() -> None:
    rooms = by_folder(import_graph(), {"smartkv", "datamodules", "lightning_modules", "callbacks", *PACKAGES})
    above = {name for name in OUTSIDE if name in ("lightning_modules", "callbacks")}
    assert not rooms["datamodules"] & (above | {"eval.common"})
    assert "callbacks" not in rooms["lightning_modules"]
    assert not any("callbacks" in imports for name, imports in rooms.items() if name.startswith("eval"))


def test_every_module_of_the_library_can_be_imported(fresh_interpreter: dict[str, Any]) -> None:
    expected = {module_name(path) for path in LIBRARY} - {"smartkv"}
    if find_spec("kvpress") is None:
        expected.remove("smartkv.press")  # says which extra it needs: see test_press.py
    if find_spec("triton") is None:
        expected -= {name for name in expected if name.startswith("smartkv.kernels.")}
    assert set(fresh_interpreter["imported"]) == expected


def test_importing_the_library_loads_no_lightning_and_nothing_outside_it(fresh_interpreter: dict[str, Any]) -> None:
    assert "smartkv" in fresh_interpreter["roots"]
    assert OUTSIDE.isdisjoint(fresh_interpreter["roots"])


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_no_line_of_the_library_imports_what_stands_outside_it(path: Path) -> None:
    assert {module.partition(".")[0] for module, _ in imported_names(path)} & OUTSIDE == set()


@pytest.mark.parametrize("path", MODULES.values(), ids=relative)
def test_no_module_imports_anothers_private_names(path: Path) -> None:
    assert [name for module, name in imported_names(path) if module in MODULES and name.startswith("_")] == []


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_each_module_has_its_test_module_or_a_reason(name: str) -> None:
    path = MODULES[name].relative_to(ROOT)
    mirrored = ROOT / "tests" / path.parent / f"test_{path.name}"
    assert mirrored.is_file() != (name in WITHOUT_TESTS)


@pytest.mark.parametrize("name", sorted(OLD_PATHS))
def test_an_old_path_has_nothing_of_its_own(name: str) -> None:
    kinds = {type(node) for node in ast.parse(MODULES[name].read_text()).body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}  # docstring, imports, __all__


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
