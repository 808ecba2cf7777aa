"""Processes of the steps: how they begin, go on and end."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from cli.recipe.run import command_of, run, shown
from eval.common.interrupts import is_step
from smartkv.errors import SmartKVError
from tests.cli.fixtures import layout_of


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(text)
    return [str(path), str(folder / "out")]


def test_a_fit_begins_goes_on_from_its_checkpoint_or_replaces_what_is_worth_nothing(tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    config = str(layout.config("distilled"))
    assert command_of(layout, "distilled") == ["main.py", "fit", "-c", config]
    (tmp_path / "distilled" / "export").mkdir(parents=True)  # killed between its export and its first checkpoint
    assert command_of(layout, "distilled") == ["main.py", "fit", "-c", config, "--overwrite"]
    (tmp_path / "distilled" / "checkpoints").mkdir()
    (tmp_path / "distilled" / "checkpoints" / "last.ckpt").touch()
    assert command_of(layout, "distilled") == ["main.py", "fit", "-c", config, "--ckpt_path", "last"]


@pytest.mark.parametrize("step", ["harvest", "report"])
def test_a_harvest_and_a_report_go_on_by_themselves(step: str, tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    (tmp_path / "shards").mkdir()
    assert command_of(layout, step) == layout.command(step)


def test_a_command_is_shown_as_it_is_typed() -> None:
    assert shown(["main.py", "fit", "-c", "a folder/x.yaml"]) == "python main.py fit -c 'a folder/x.yaml'"


def test_a_command_imports_the_checkout_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(script(tmp_path, "import sys, cli.recipe; open(sys.argv[1], 'w').write('x')"))
    assert (tmp_path / "out").read_text() == "x"


def test_a_command_that_fails_is_told_with_its_status(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"script\.py .*' stopped with status 2: "):
        run(script(tmp_path, "import sys; sys.exit(2)"))


def test_a_command_that_is_killed_is_told_with_the_likely_reason(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="killed by signal 9, often because the memory was full"):
        run(script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))


def test_a_command_that_was_interrupted_interrupts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(script(tmp_path, "import sys; sys.exit(130)"))


WAITING = """
import signal, sys, time
def end(*_):
    open(sys.argv[1], "a").write(" ended")
    sys.exit(130)
signal.signal(signal.SIGINT, end)
open(sys.argv[1], "w").write("ready")
time.sleep(60)
"""


def test_an_interrupt_that_only_reaches_the_parent_ends_the_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.recipe.run.GRACE", 0.1)
    out = tmp_path / "out"

    def interrupt() -> None:
        while not out.exists() or out.read_text() != "ready":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(script(tmp_path, WAITING))
    thread.join()
    assert out.read_text() == "ready ended"  # by the signal of a Ctrl-C, so that it writes what it has
    assert capsys.readouterr().err.strip() == "waiting for the step to write what it has …"


def test_a_command_knows_that_it_is_a_step(tmp_path: Path) -> None:
    run(
        script(
            tmp_path,
            "import sys; from eval.common.interrupts import is_step; open(sys.argv[1], 'w').write(str(is_step()))",
        )
    )
    assert (tmp_path / "out").read_text() == "True" and not is_step()


def test_the_python_is_the_one_that_runs(tmp_path: Path) -> None:
    run(script(tmp_path, "import sys; open(sys.argv[1], 'w').write(sys.executable)"))
    assert (tmp_path / "out").read_text() == sys.executable
