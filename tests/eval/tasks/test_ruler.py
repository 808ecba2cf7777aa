"""`python -m eval ruler` on a tiny backbone."""

from pathlib import Path
from typing import Any

import pytest

from eval.tasks.ruler_generator import FAMILIES


def test_ruler_runs_all_families_and_scores_what_is_generated(run_task: Any, tmp_path: Path) -> None:
    changes = {"lengths": "[2400]", "samples": 1, "contenders": '["all-gated", "window"]'}
    found = run_task("ruler", tmp_path, **changes)
    for row in found["rows"]:
        assert [sample["group"][0] for sample in row["samples"]] == list(FAMILIES)
        assert all(0 <= sample["score"] <= 1 and sample["nll"] > 0 for sample in row["samples"])
    assert (tmp_path / "ruler_score.png").is_file() and (tmp_path / "ruler_nll.png").is_file()


def test_mistakes_in_ruler_are_told(run_task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({"lengths": "[200]"}, {"families": '["qa"]'}, {"lengths": "[6000]", "samples": 1}):
        with pytest.raises(SystemExit):
            run_task("ruler", tmp_path, **changes)
        assert capsys.readouterr().err.startswith("error: ")
