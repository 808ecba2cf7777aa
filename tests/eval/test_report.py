"""`python -m eval report`: figures against plain recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval.__main__ import main
from smartkv import GateBank, Manifest, load_backbone


@pytest.fixture(scope="module")
def report(demo_run: Path) -> dict[str, Any]:
    main(["report", "--run", str(demo_run), "--out", str(demo_run), "--score_from", "16"])
    return json.loads((demo_run / "report.json").read_text())


def test_the_report_has_what_it_promises(report: dict[str, Any], demo_scores: dict[str, Any], demo_run: Path) -> None:
    assert report["heads"] == 4
    assert report["tokens_harvested"] == 10 * 64
    assert report["texts"][0]["name"] == "mine"
    for name in ("r2_mean", "r2_median", "r2_token_table"):
        assert report[name] == demo_scores[name]
    assert GateBank.from_pretrained(report["gates"])
    assert load_backbone(report["model"])


def test_nll_full_is_the_frozen_models_on_the_validation_windows(report: dict[str, Any], demo_run: Path) -> None:
    manifest = Manifest.read(demo_run / "shards")
    model = load_backbone(manifest.arguments["backbone"], "float32").model
    total, count = 0.0, 0
    for entry in manifest.of_split("validation"):
        for tokens in load_file(manifest.folder / entry.file)["token"].view(-1, manifest.window).long():
            with torch.no_grad():
                logs = model(tokens[None]).logits[0].log_softmax(dim=-1)
            total -= float(logs[15:-1].gather(1, tokens[16:, None]).sum())
            count += manifest.window - 16
    assert report["nll_full"] == pytest.approx(total / count, rel=1e-5)


def test_a_report_that_is_there_is_shown_again(
    demo_run: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo_run / "report.json").stat().st_mtime_ns
    main(["report", "--run", str(demo_run), "--out", str(demo_run), "--reuse", "true"])
    assert (demo_run / "report.json").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert f"mean R² {report['r2_mean']:.3f}" in shown and "r2_by_layer.png" in shown


def test_the_report_has_the_frontier_of_gates_and_window(report: dict[str, Any], demo_run: Path) -> None:
    measured = json.loads((demo_run / "perplexity/perplexity.json").read_text())["frontier"]
    assert [row["policy"] for row in report["frontier"]] == ["all-gated"] * 3 + ["window"] * 3
    for row, point in zip(report["frontier"], measured, strict=True):
        assert set(row) == {"policy", "footprint", "delta_nll", "peak_bytes", "peak_bytes_full"}
        assert all(row[name] == point[name] for name in row)


def test_the_report_ends_with_what_was_won(
    demo_run: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", "--run", str(demo_run), "--out", str(demo_run), "--reuse", "true"])
    shown = capsys.readouterr().out
    assert "What is lost when keys are evicted" in shown and "frontier.png" in shown


def test_a_report_of_gates_without_r2_is_refused(
    demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("shards", "gates", "perplexity"):
        (tmp_path / name).symlink_to(demo_run / name)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "gates.json").write_text(json.dumps({"r2_mean": None}))
    with pytest.raises(SystemExit):
        main(["report", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "have no R²" in capsys.readouterr().err
