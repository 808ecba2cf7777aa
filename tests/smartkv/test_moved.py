"""Modules of version 0.1 that have moved answer with their new name."""

import importlib
from importlib.util import find_spec

import pytest

import smartkv
from smartkv.moved import MOVED
from tests.conftest import ROOT


@pytest.mark.parametrize("name", sorted(MOVED))
def test_importing_a_moved_module_names_the_new_one_which_exists(name: str) -> None:
    with pytest.raises(ModuleNotFoundError) as refusal:
        importlib.import_module(f"smartkv.{name}")
    for new in MOVED[name]:
        assert f"smartkv.{new}" in str(refusal.value) and find_spec(f"smartkv.{new}") is not None


def test_every_way_of_importing_one_is_answered() -> None:
    line = r"smartkv\.attached is now smartkv\.cache\.attached"
    for statement in ("import smartkv.attached", "from smartkv import attached", "from smartkv.attached import X"):
        with pytest.raises(ModuleNotFoundError, match=line):
            exec(statement, {})
    with pytest.raises(AttributeError, match=line):
        smartkv.attached  # type: ignore[attr-defined] # noqa: B018


def test_a_name_that_never_was_has_pythons_own_message() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'smartkv\.nonsense'$"):
        importlib.import_module("smartkv.nonsense")
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'smartkv'"):
        exec("from smartkv import nonsense", {})
    with pytest.raises(AttributeError, match="module 'smartkv' has no attribute 'nonsense'"):
        smartkv.nonsense  # type: ignore[attr-defined] # noqa: B018


def test_the_changelog_lists_the_same_modules() -> None:
    listed = (
        (ROOT / "CHANGELOG.md").read_text().split("| module in 0.1.0 | now |")[1].split("| name in 0.1.0 | now |")[0]
    )
    assert [name for name in MOVED if f"`{name}`" not in listed and f"`smartkv.{name}`" not in listed] == []
