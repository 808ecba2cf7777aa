"""What a training changed: costs before and after, on the same windows alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main

DOCUMENTS = [0, 0, 1, 2]


def result(full: list[float], costs: dict[tuple[str, float], list[float]]) -> dict[str, Any]:
    rows = [
        {
            "contender": name,
            "target": target,
            "texts": {"books": {"footprint": target, "delta_nll_window": windows}},
        }
        for (name, target), windows in costs.items()
    ]
    settings = {"window": 64, "score_from": 20, "protocol": "stream", "prefill": None, "seed": 0}
    settings |= {"backbone": "tiny", "dtype": "float32", "calibration": {"windows": 2, "sources": ["mine"]}}
    settings |= {"texts": {"books": {"digest": "abc", "documents": DOCUMENTS}}}
    whole = {"texts": {"books": {"nll_window": full}}}
    return {"format_version": 1, "command": "compare", "arguments": settings, "full": whole, "rows": rows}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    window, gates = ("window", 0.125), ("gates", 0.125)
    results = {
        "base": result([3.0, 3.2, 3.1, 3.3], {window: [0.2, 0.2, 0.1, 0.3], gates: [0.1, 0.1, 0.1, 0.1]}),
        "plain": result([2.9, 3.1, 3.0, 3.2], {window: [0.2, 0.2, 0.1, 0.3], gates: [0.1, 0.1, 0.1, 0.1]}),
        "tuned": result([3.0, 3.2, 3.1, 3.34], {window: [0.1, 0.1, 0.05, 0.15], gates: [0.1, 0.1, 0.2, 0.2]}),
    }
    for name, content in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps(content))
    return {name: tmp_path / name for name in results}


def gains(runs: dict[str, Path], **changes: Any) -> dict[str, Any]:
    out = runs["base"].parent / "out"
    trained = json.dumps([str(runs["plain"]), str(runs["tuned"])])
    settings = {"out": out, "base": runs["base"], "trained": trained} | changes
    main(["gains", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    assert (out / "gains.png").is_file() and "fall" in (out / "gains.md").read_text()
    return json.loads((out / "gains.json").read_text())


def test_the_fall_is_that_of_the_mean_cost_and_the_full_cache_is_paired(runs: dict[str, Path]) -> None:
    found = gains(runs)
    falls = {(Path(g["run"]).name, g["contender"]): g for g in found["gains"]}
    assert falls["tuned", "window"]["fall"] == pytest.approx(0.5)
    assert falls["tuned", "window"]["interval"] == pytest.approx([0.5, 0.5])  # of every window it is a half
    assert falls["tuned", "gates"]["fall"] == pytest.approx(-0.5) and falls["plain", "gates"]["fall"] == 0
    assert falls["tuned", "window"]["nll_before"] == pytest.approx(3.15 + 0.2)
    assert falls["tuned", "window"]["nll"] == pytest.approx(3.16 + 0.1)
    assert falls["tuned", "window"]["nll_change"] == pytest.approx(-0.09)
    assert falls["plain", "window"]["nll_interval"] == pytest.approx([-0.1, -0.1])  # in every window
    change = {Path(each["run"]).name: each["change"] for each in found["full"]}
    assert change == {"plain": pytest.approx(-0.1), "tuned": pytest.approx(0.01)}


def test_costs_may_be_compared_with_those_of_another_training(runs: dict[str, Path]) -> None:
    found = gains(runs, against=runs["plain"])
    assert {Path(g["run"]).name for g in found["gains"]} == {"tuned"} and len(found["full"]) == 2


def test_where_nothing_was_lost_before_nothing_can_fall(runs: dict[str, Path]) -> None:
    for name, costs in {"base": [-0.01, 0.0, -0.02, 0.01], "tuned": [0.01, 0.01, 0.01, 0.01]}.items():
        path = runs[name] / "compare.json"
        content = json.loads(path.read_text())
        content["rows"] = [row for row in content["rows"] if row["contender"] == "window"]
        content["rows"][0]["texts"]["books"]["delta_nll_window"] = costs
        path.write_text(json.dumps(content))
    (gain,) = gains(runs, trained=json.dumps([str(runs["tuned"])]))["gains"]
    assert gain["fall"] is None and gain["interval"] is None
    assert gain["change"] == pytest.approx(0.015) and gain["change_interval"][0] >= 0


@pytest.mark.parametrize("what", ["digest", "window", "dtype", "older", "contender"])
def test_results_that_were_not_measured_alike_are_refused(
    runs: dict[str, Path], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs["tuned"] / "compare.json"
    content = copy.deepcopy(json.loads(path.read_text()))
    if what == "digest":
        content["arguments"]["texts"]["books"]["digest"] = "other"
    elif what == "window":
        content["arguments"]["window"] = 128
    elif what == "dtype":
        content["arguments"]["dtype"] = "bfloat16"
    elif what == "older":
        del content["arguments"]["calibration"]
    else:
        content["rows"] = [row | {"contender": "h2o"} for row in content["rows"]]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        gains(runs)
    assert ("no policy" if what == "contender" else "not measured alike") in capsys.readouterr().err


def test_a_folder_that_is_none_of_the_trained_is_refused(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gains(runs, against="elsewhere")
    assert "against must be one of the folders" in capsys.readouterr().err
