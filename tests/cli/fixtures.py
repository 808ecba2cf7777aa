"""Runs of `python -m cli.make_gates` in this process, on a tiny model, with texts that are at hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.make_gates import main
from cli.recipe.configs import Layout
from cli.recipe.look import Kind, Look
from cli.recipe.mix import Part
from eval.__main__ import main as eval_main
from eval.common.interrupts import STEP
from tests.lightning_fixtures import prose, run_cli

Runner = Callable[[list[str]], None]


def run_here(command: list[str]) -> None:
    """`cli.recipe.run.run` without a process of its own, which takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP, "1")
        if command[0] == "main.py":
            run_cli(*command[1:])
        else:
            assert command[:2] == ["-m", "eval"]
            eval_main(command[2:])


def look_here(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`run_isolated` without a process of its own."""
    return {"peak_memory": 10**9} | measure(*arguments)


def make(monkeypatch: pytest.MonkeyPatch, runner: Runner, *args: str | Path) -> None:
    """The command, whose steps `runner` runs."""
    with monkeypatch.context() as patch:
        patch.setattr("cli.recipe.run.run", runner)
        patch.setattr("cli.recipe.look.run_isolated", look_here)
        main([str(arg) for arg in args])


def never(command: list[str]) -> None:
    raise AssertionError(f"{command} was run")


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        make(monkeypatch, never, *args)
    output = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def write_own_texts(folder: Path) -> Path:
    """Texts of a user's own, long enough for windows of 512 tokens in each split."""
    for number, split in enumerate(("train", "validation", "test")):
        (folder / split).mkdir(parents=True)
        for file in range(3):
            (folder / split / f"{split}{file}.txt").write_text(prose(1500, 10 * number + file))
    return folder


def own_sources(folder: Path) -> str:
    return json.dumps([{"name": "mine", "path": str(folder)}])


def a_look(**changes: Any) -> Look:
    """What a look at a small model may give."""
    seconds = {"harvest": 1.0, "gates": 0.1, "forward": 0.5, "distilled": 2.0, "report": 0.5}
    settings = {
        "model_type": "llama", "layers": 4, "kv_heads": 2, "head_dim": 8, "max_positions": 4096, "gated_layers": 3,
        "parameters": 1000, "scored_tokens": 512, "device": "cpu", "threads": 2,
        "parts": [Part("books", "pg19", 0.15, ["local"]), Part("books", "recall", 0.1, ["local"])],
        "kinds": [Kind("books", "test", [{"name": "pg19", "weight": 0.15, "origins": ["local"]}])],
        "seconds": seconds,
    }  # fmt: skip
    return Look(**settings | changes)


def layout_of(folder: Path) -> Layout:
    folder.mkdir(parents=True, exist_ok=True)
    return Layout(folder)
