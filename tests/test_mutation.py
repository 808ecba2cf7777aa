"""The command behind `make mutation`: what it names exists, and how it counts."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "mutation.py"))


def test_what_judges_a_package_exists() -> None:
    packages = [f"{top}/{package}" for package in SCRIPT["PACKAGES"] for top in ("smartkv", "tests/smartkv")]
    for name in packages + SCRIPT["NEEDED"] + SCRIPT["TOO_SLOW"]:
        path, _, test = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not test or f"def {test}(" in (ROOT / path).read_text(), name


def test_make_runs_the_script_in_an_environment_of_its_own() -> None:
    rules = (ROOT / "Makefile").read_text()
    assert re.search(r"^mutation: (\.venv-mutation)/\.installed\n.*\bscripts/mutation\.py ", rules, re.MULTILINE)
    assert ".venv-mutation/" in (ROOT / ".gitignore").read_text().splitlines()


def test_settings_mutate_one_package_and_keep_pytests_settings() -> None:
    tool = tomllib.loads(SCRIPT["settings"]("labels"))["tool"]
    assert tool["mutmut"]["only_mutate"] == ["smartkv/labels/*"]
    assert tool["mutmut"]["pytest_add_cli_args_test_selection"] == ["tests/smartkv/labels"]
    assert tool["pytest"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]


@pytest.mark.parametrize(
    ("line", "is_wording"),
    [
        ('        raise SmartKVError(f"price must be a number, got {price}")', True),
        ('            "the cache was filled by another model",', True),
        ('    if rule == "full" and window is not None:', False),
        ('    return {"keys": keys}', False),
    ],
)
def test_wording_is_left_as_it_is(line: str, is_wording: bool) -> None:
    assert any(re.search(pattern, line) for pattern in SCRIPT["WORDING"]) is is_wording


def test_killed_and_timed_out_mutants_make_the_score() -> None:
    codes = {"killed": 1, "crashed": 3, "slow": -24, "survived": 0, "unseen": 33, "open": None, "tests not found": 255}
    cells = dict(zip(SCRIPT["COLUMNS"], SCRIPT["row"](codes), strict=True))
    assert cells == {
        "killed": "2", "timed out": "1", "survived": "1", "no test": "1", "to do": "2", "score": "60.0%",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What mutmut leaves: a function, the copy of it as it was, two mutants, and the verdicts."""
    code = ["def x_f__mutmut_orig(a):", "    return a + 1", "def x_f__mutmut_1(a):", "    return a - 1"]
    code += ["def x_f__mutmut_2(a):", "    return a + 2"]
    package = tmp_path / "mutants" / "smartkv" / "labels"
    package.mkdir(parents=True)
    (package / "m.py").write_text("\n".join(code))
    spans = {"x_f__mutmut_orig": [1, 2], "x_f__mutmut_1": [3, 4], "x_f__mutmut_2": [5, 6]}
    (package / "m.py.spans").write_text(json.dumps({"version": 1, "spans": spans}))
    codes: dict[str, Any] = {"smartkv.labels.m.x_f__mutmut_1": 0, "smartkv.labels.m.x_f__mutmut_2": 1}
    (package / "m.py.meta").write_text(json.dumps({"exit_code_by_key": codes, "durations_by_key": {}}))
    return tmp_path


def test_a_survivor_is_shown_as_the_lines_that_it_changes(folder: Path) -> None:
    (shown,) = SCRIPT["survivors"](folder, "labels")
    lines = shown.splitlines()
    assert lines[0] == "# smartkv.labels.m.x_f__mutmut_1"
    assert lines[1:] == ["-    return a + 1", "+    return a - 1"]


@pytest.mark.parametrize("again", [False, True])
def test_again_forgets_survivors_and_every_run_what_had_no_verdict(again: bool, folder: Path) -> None:
    meta = folder / "mutants" / "smartkv" / "labels" / "m.py.meta"
    data = json.loads(meta.read_text())
    data["exit_code_by_key"]["smartkv.labels.m.x_f__mutmut_3"] = 255
    meta.write_text(json.dumps(data))
    SCRIPT["forget"](folder, "labels", again)
    codes = SCRIPT["results"](folder, "labels")["m"]
    assert list(codes.values()) == [None if again else 0, 1, None]
