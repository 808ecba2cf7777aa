"""What is mistyped in `make gates`, what it is told, and what is understood."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.make_gates import main, spelled_out, without_overwrite
from tests.cli.fixtures import refused
from tests.imports import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "huge"], "size"),
        (["--backbone", "/nowhere/at/all"], "there is no such folder"),
        (["--stop-after", "dinner"], "stop_after"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--licence", " "], "--licence is empty"),
        (["--sources", '[{"name": "songs"}]'], "source 'songs' is unknown"),
        (["--sources", "[]"], "sources is empty"),
        (["--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--sizes", "tiny"], "--size"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str],
    said: str,
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--backbone", str(tiny_backbone), "--out", str(tmp_path / "out"), *options]
    assert said in refused(capsys, monkeypatch, *args)
    assert not (tmp_path / "out").exists()


def test_all_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, monkeypatch) == "error: --backbone and --out are required, and were not given"
    assert "--out is required" in refused(capsys, monkeypatch, "--backbone", "x")


@pytest.mark.parametrize("given", [[], ["MODEL=x"], ["OUT=y"]])
def test_make_says_what_is_missing(given: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "OUT")}
    done = subprocess.run(["make", "gates", *given], cwd=ROOT, env=environment, capture_output=True, text=True)
    missing = "OUT" if given == ["MODEL=x"] else "MODEL"
    assert done.returncode == 2 and f"{missing} is missing: make gates MODEL=<" in done.stderr


def test_dashes_and_a_bare_overwrite_are_understood() -> None:
    assert spelled_out(["--stop-after", "look", "--overwrite", "--out=a-b"]) == [
        "--stop_after", "look", "--overwrite", "true", "--out=a-b",
    ]  # fmt: skip
    assert spelled_out(["--overwrite", "false"]) == ["--overwrite", "false"]


@pytest.mark.parametrize("given", [["--overwrite"], ["--overwrite", "true"], ["--overwrite=true"]])
def test_a_run_that_began_anew_goes_on_without_beginning_anew(given: list[str]) -> None:
    command = ["--trust_remote_code", "true", *given, "--out", "x"]
    assert without_overwrite(command) == ["--trust_remote_code", "true", "--out", "x"]


@pytest.mark.parametrize("given", [["--help"]])
def test_help_explains_every_option(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(given)
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "last step to run" in said and "mix of books" in " ".join(said.split())
