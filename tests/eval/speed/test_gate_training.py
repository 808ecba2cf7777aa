"""`python -m eval training` at a tiny size."""

import json
from pathlib import Path

import pytest

from eval.__main__ import main


@pytest.mark.usefixtures("measured")
def test_it_measures_both_ways_and_the_growth_of_heads(tmp_path: Path) -> None:
    small = {"batches": "[32]", "models": '["Qwen2.5-0.5B"]', "steps": 2, "rounds": 1, "window": 64, "windows": 4}
    settings = small | {"out": tmp_path, "threads": 1, "markdown_file": tmp_path / "page.md"}
    main(["training", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    found = json.loads((tmp_path / "training.json").read_text())
    (way,), (heads,) = found["ways"], found["heads"]
    assert way["ratio"] == pytest.approx(way["apart"] / way["together"])
    # 28 keys of a window are labelled, a block of 28; a batch of 32 takes one
    assert way["rows_a_step"] == 28 and heads["rows_a_step"] == 28
    assert way["rows_trained"] == pytest.approx(2 * 28 / way["together"]) and way["rows_from_shards"] > 0
    assert heads["heads"] == 48 and heads["steps_per_second"] > 0 and heads["peak_memory"] > 2**20
    assert "one by one" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [way["together"], way["apart"]] == [*way["rounds"]["together"], *way["rounds"]["apart"]]


@pytest.mark.parametrize(("name", "value"), [("models", '["GPT-7"]'), ("steps", "0"), ("batches", "[]")])
def test_mistakes_are_told_in_a_line(name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["training", "--out", str(tmp_path), f"--{name}", value])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
