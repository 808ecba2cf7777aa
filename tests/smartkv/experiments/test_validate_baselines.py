"""The old name of `python -m eval baselines`."""

import subprocess
import sys
from pathlib import Path

import pytest

from smartkv.experiments import validate_baselines
from tests.conftest import ROOT


def test_it_runs_the_command_of_today_with_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["validate_baselines", "--help"])
    with pytest.raises(SystemExit) as stop:
        validate_baselines.main()
    assert stop.value.code == 0
    assert "eval [options] baselines" in capsys.readouterr().out and sys.argv == ["eval", "baselines", "--help"]


def test_outside_the_checkout_one_line_says_where_to_run_it(tmp_path: Path) -> None:
    (tmp_path / "smartkv").symlink_to(ROOT / "smartkv")
    command = [sys.executable, "-m", "smartkv.experiments.validate_baselines"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr == ""
    assert run.stdout == (
        "error: run it from the checkout of SmartKV: the commands are not part of the installed library\n"
    )
