"""`python -m eval objectives`: figures against plain recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main
from smartkv import GateBank
from tests.eval.eviction.test_perplexity import measure
from tests.models import save_random_gates

ROOT = Path(__file__).parents[3]


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, recall_shards: Path, tiny_backbone: Path, tiny_texts: Path
) -> tuple[Path, dict[str, Any]]:
    out, runs = tmp_path_factory.mktemp("objectives"), {}
    for name, target in (("huber", "log4 lifespan"), ("ranking", "rank of lifespan")):
        gates = GateBank.from_pretrained(save_random_gates(tiny_backbone, out / name / "first"))
        gates.details |= {"target": target}
        gates.save_pretrained(out / name / "export")
        places = [
            "--gates",
            str(out / name / "export"),
            "--shards",
            str(recall_shards),
            "--out",
            str(out / name / "scores"),
        ]
        main(["gates", *places])
        runs[name] = str(out / name)
    measure(out / "huber/perplexity", tiny_backbone, tiny_texts, gates=out / "huber/export", split="validation",
            policies='["all-gated"]', footprints="[0.3, 0.8]")  # fmt: skip
    main(["objectives", "--runs", json.dumps(runs), "--out", str(out / "table"), "--footprints", "[0.5, 0.99]"])
    return out, json.loads((out / "table/objectives.json").read_text())["rows"]


def test_every_figure_is_that_of_the_run_it_comes_from(compared: Any) -> None:
    out, rows = compared
    for name in ("huber", "ranking"):
        scores = json.loads((out / name / "scores/gates.json").read_text())
        assert rows[name]["r2_mean"] == scores["r2_mean"]
        assert rows[name]["concordance"] == scores["order"]["scores"]["gates"]["concordance"]["mean"]
    assert rows["ranking"]["r2_mean"] is None and rows["huber"]["r2_mean"] is not None
    assert rows["null: constant"]["concordance"] == 0.5
    assert (out / "table/order.png").stat().st_size > 10_000 and (out / "table/r2_by_layer.png").exists()


def test_the_table_is_left_as_markdown_too(compared: Any) -> None:
    out, rows = compared
    lines = (out / "table/objectives.md").read_text().splitlines()
    assert lines[0].startswith("### ") and lines[3].startswith("| --- | ---: |")
    told = next(line for line in lines if line.startswith("| ranking |"))
    assert f"| {rows['ranking']['concordance']:.3f} |" in told and "| – |" in told
    assert {line.count("|") for line in lines[2:] if line.startswith("|")} >= {lines[2].count("|")}


def test_losses_are_read_between_measured_points_and_not_beyond(compared: Any) -> None:
    out, rows = compared
    points = json.loads((out / "huber/perplexity/perplexity.json").read_text())["frontier"]
    low, high = sorted(max(point["delta_nll"], 1e-9) for point in points)
    assert low <= rows["huber"]["delta_nll"]["0.5"] <= high
    assert rows["huber"]["delta_nll"]["0.99"] is None and "delta_nll" not in rows["ranking"]


@pytest.mark.parametrize(
    ("wrong", "said"), [('{"a": "/nowhere"}', "run `eval gates` first"), ("{}", "there is nothing to compare")]
)
def test_mistakes_are_told_in_a_line(wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["objectives", "--runs", wrong, "--out", str(tmp_path)])
    assert stop.value.code == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["objectives", "thresholds"])
def test_the_configs_of_objectives_run(name: str, compared: Any, tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / f"configs/eval/{name}.yaml").read_text())
    runs = {run: str(compared[0] / "huber") for run in written["runs"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written | {"runs": runs, "out": str(tmp_path / "out")}))
    main(["objectives", "--config", str(tmp_path / "config.yaml")])
    assert {*written["runs"]} < {*json.loads((tmp_path / "out/objectives.json").read_text())["rows"]}
