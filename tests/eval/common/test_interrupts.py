"""Ctrl-C: one line that says how to go on, at any moment."""

import subprocess
import sys
from typing import Any

import pytest

from eval.__main__ import COMMANDS, RESUMED, main
from eval.common.interrupts import STATUS, STEP, interrupted_line, typed_command
from tests.lightning_fixtures import ROOT

SCRIPT = "from eval.common.interrupts import quiet_interrupts; quiet_interrupts(resumes={}); raise {}"


def run_script(error: str, resumes: bool = False, **environment: str) -> str:
    """Stderr of a process in which nobody catches an error."""
    command = [sys.executable, "-c", SCRIPT.format(resumes, error)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr


def interrupted(out: str = "x") -> Any:
    """Measure."""
    raise KeyboardInterrupt


def test_the_line_quotes_a_command_so_that_it_can_be_typed() -> None:
    command = ["python", "-m", "eval", "compare", "--footprints", "[0.1, 0.2]"]
    line = interrupted_line(command, resumes=True)
    assert line == "interrupted: go on with: python -m eval compare --footprints '[0.1, 0.2]'"
    assert interrupted_line(command, resumes=False).startswith("interrupted: begin again with: ")


def test_a_command_is_the_one_that_was_typed_or_given() -> None:
    assert typed_command(["fit"], ["python", "main.py"]) == ["python", "main.py", "fit"]
    assert typed_command(None, []) == sys.orig_argv


def test_an_interrupt_while_modules_are_imported_is_one_line() -> None:
    said = run_script("KeyboardInterrupt")
    assert said.strip().startswith("interrupted: begin again with: ") and "Traceback" not in said


def test_of_several_processes_one_tells() -> None:
    assert run_script("KeyboardInterrupt", LOCAL_RANK="1") == ""


def test_a_step_of_another_command_leaves_it_to_that_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("KeyboardInterrupt", **{STEP: "1"}) == ""
    monkeypatch.setenv(STEP, "1")
    monkeypatch.setitem(COMMANDS, "compare", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["compare"])
    assert stop.value.code == STATUS and capsys.readouterr().err == ""


@pytest.mark.parametrize(("environment", "said"), [({STEP: "1"}, ["left"]), ({}, [])])
def test_a_step_that_is_done_leaves_without_a_word(environment: dict[str, str], said: list[str]) -> None:
    work = "import os, signal; from eval.common.interrupts import end_quietly; end_quietly(); "
    script = f"{work} os.kill(os.getpid(), signal.SIGINT); print('left')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == said and ("Traceback" in done.stderr) == (not said)


def test_another_error_keeps_its_traceback() -> None:
    assert "Traceback" in run_script("ValueError('a bug')")


@pytest.mark.parametrize("command", ["compare", "calibrate"])
def test_an_interrupted_measurement_says_how_to_go_on(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, command, interrupted)
    with pytest.raises(SystemExit) as stop:
        main([command, "--out", "y"])
    word = "go on" if command in RESUMED else "begin again"
    assert stop.value.code == STATUS
    assert capsys.readouterr().err.strip() == f"interrupted: {word} with: python -m eval {command} --out y"


def test_the_commands_that_resume_are_commands() -> None:
    assert set(RESUMED) <= set(COMMANDS)
