"""`python -m eval objectives` and `layers`: figures against plain recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from smartkv import GateBank, Manifest
from smartkv.shards.labelled_keys import LabelledKeys
from tests.eval.eviction.test_perplexity import measure
from tests.lightning_fixtures import harvest, write_texts
from tests.models import save_random_gates

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """Windows of plain text, and of text that asks back."""
    folder = tmp_path_factory.mktemp("shards")
    texts = write_texts(folder / "books", ["train", "validation", "test"])
    sources = [
        {"name": "pg19", "weight": 0.5, "origins": ["local"]},
        {"name": "recall", "weight": 0.5, "origins": ["local"]},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMARTKV_DATA", str(folder))
        return harvest(
            folder / "shards",
            tiny_backbone,
            texts,
            windows={"train": 4, "validation": 2},
            data={"window": 512, "sources": sources},
        )


@pytest.fixture(scope="module")
def characterised(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_backbone: Path) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("layers")
    gates = save_random_gates(tiny_backbone, out / "gates")
    main(["layers", "--shards", str(shards), "--out", str(out), "--gates", str(gates), "--windows", "[4, 16]"])
    return out, json.loads((out / "layers.json").read_text())["by_head"]


def test_heads_are_told_by_their_labels(characterised: Any, shards: Path) -> None:
    out, found = characterised
    rows = LabelledKeys(Manifest.read(shards), 0.05)
    asking, plain = [], []
    for block in rows.blocks("validation"):
        source = rows.manifest.documents[int(rows.document(block)[0])].partition("/")[0]
        (asking if source == "recall" else plain).append(rows.target(block))
    a, b = torch.cat(asking, dim=1), torch.cat(plain, dim=1)
    beyond = [
        (torch.cat([a, b], dim=1) > 2.0).double().mean(dim=1),
        (a > 2.0).double().mean(dim=1) - (b > 2.0).double().mean(dim=1),
    ]
    for name, want in zip(("hit_beyond_16", "needle"), beyond, strict=True):
        assert torch.tensor(found[name]).flatten().tolist() == pytest.approx(want.tolist(), abs=1e-6)
    gates = GateBank.from_pretrained(out / "gates")
    with torch.no_grad():
        said = torch.cat([gates(rows.keys(block).float())[..., 0] for block in rows.blocks("validation")], dim=1)
    cap = (said.quantile(0.99, dim=1) * 2).exp2()
    assert torch.tensor(found["predicted_cap"]).flatten().tolist() == pytest.approx(cap.tolist(), rel=1e-4)
    for name in ("beyond_windows", "hit_beyond_16_by_head", "needle_by_head", "predicted_cap_by_head"):
        assert (out / f"{name}.png").stat().st_size > 8_000


@pytest.mark.parametrize("windows", ["[]", "[0]", "[4000]"])
def test_windows_outside_the_follow_up_are_refused(
    windows: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["layers", "--shards", str(shards), "--out", str(tmp_path), "--windows", windows])
    assert "windows must lie between 1 and the follow-up" in capsys.readouterr().err


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_backbone: Path, tiny_texts: Path
) -> tuple[Path, dict[str, Any]]:
    out, runs = tmp_path_factory.mktemp("objectives"), {}
    for name, target in (("huber", "log4 lifespan"), ("ranking", "rank of lifespan")):
        gates = GateBank.from_pretrained(save_random_gates(tiny_backbone, out / name / "first"))
        gates.details |= {"target": target}
        gates.save_pretrained(out / name / "export")
        places = ["--gates", str(out / name / "export"), "--shards", str(shards), "--out", str(out / name / "scores")]
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


def test_the_config_of_layers_runs(shards: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / "configs/eval/layers.yaml").read_text())
    mine = {"shards": str(shards), "gates": None, "out": str(tmp_path / "out"), "windows": [4, 16, 24]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written | mine))
    main(["layers", "--config", str(tmp_path / "config.yaml")])
    assert "needle" in json.loads((tmp_path / "out/layers.json").read_text())["by_head"]


@pytest.mark.parametrize("name", ["objectives", "thresholds"])
def test_the_configs_of_objectives_run(name: str, compared: Any, tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / f"configs/eval/{name}.yaml").read_text())
    runs = {run: str(compared[0] / "huber") for run in written["runs"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written | {"runs": runs, "out": str(tmp_path / "out")}))
    main(["objectives", "--config", str(tmp_path / "config.yaml")])
    assert {*written["runs"]} < {*json.loads((tmp_path / "out/objectives.json").read_text())["rows"]}
