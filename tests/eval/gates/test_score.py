"""`python -m eval gates` and `report`: figures against plain recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.functional import r2_score

from eval.__main__ import main
from smartkv import GateBank, Manifest, load_backbone
from smartkv.gates.objectives import OrdinalAges
from smartkv.metrics.ranking import concordance, top_share
from smartkv.shards.labelled_keys import LabelledKeys
from tests.eval.eviction.test_perplexity import measure
from tests.lightning_fixtures import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path) -> Path:
    """The folder that harvest, fit and `eval gates` leave, as the demo's."""
    root = tmp_path_factory.mktemp("run")
    (root / "shards").symlink_to(tiny_shards)
    export = {"class_path": "GateExport", "init_args": {"out": str(root / "gates" / "export")}}
    fit(tiny_shards, root / "gates", callbacks=[export])
    arguments = ["--gates", root / "gates" / "export", "--shards", root / "shards", "--out", root / "scores"]
    main(["gates", *map(str, arguments)])
    measure(root / "perplexity", tiny_backbone, tiny_texts, gates=root / "gates" / "export", split="validation",
            policies='["all-gated", "window"]', footprints="[0.3, 0.5, 0.8]")  # fmt: skip
    return root


@pytest.fixture(scope="module")
def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "scores" / "gates.json").read_text())


@pytest.fixture(scope="module")
def rows(run: Path) -> LabelledKeys:
    return LabelledKeys(Manifest.read(run / "shards"), 0.05)


def whole_split(rows: LabelledKeys, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = rows.blocks(split)
    keys = torch.cat([rows.keys(block) for block in blocks], dim=1)
    return keys, torch.cat([rows.target(block) for block in blocks], dim=1)


def test_r2_is_that_of_the_exported_gates_on_all_validation_keys(
    run: Path, scores: dict[str, Any], rows: LabelledKeys
) -> None:
    keys, target = whole_split(rows, "validation")
    with torch.no_grad():
        prediction = GateBank.from_pretrained(run / "gates" / "export")(keys.float())[..., 0]
    expected = r2_score(prediction.double().T, target.double().T, multioutput="raw_values")
    assert list(scores["r2_head"]) == ["L00H0", "L00H1", "L01H0", "L01H1"]
    assert list(scores["r2_head"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert scores["r2_mean"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert scores["r2_median"] == pytest.approx(float(expected.median()), abs=1e-6)


def test_the_exported_figure_is_the_one_that_fit_logged(run: Path, scores: dict[str, Any]) -> None:
    config = json.loads((run / "gates" / "export" / "config.json").read_text())
    assert config["details"]["metrics"]["val_r2_mean"] == pytest.approx(scores["r2_mean"], abs=1e-4)


def test_the_constant_null_is_the_mean_of_the_training_labels(scores: dict[str, Any], rows: LabelledKeys) -> None:
    _, train = whole_split(rows, "train")
    _, target = whole_split(rows, "validation")
    constant = train.mean(dim=1, keepdim=True).expand_as(target)
    expected = r2_score(constant.double().T, target.double().T, multioutput="raw_values")
    assert list(scores["r2_head_nulls"]["constant"].values()) == pytest.approx(expected.tolist(), abs=1e-4)


def test_every_null_stands_beside_the_gates(scores: dict[str, Any]) -> None:
    assert set(scores["r2_nulls"]) == {"constant", "position", "token_table", "random"}
    assert scores["r2_above_token_table"] == pytest.approx(scores["r2_mean"] - scores["r2_token_table"])
    low, high = scores["r2_mean_interval_95"]
    assert low <= scores["r2_mean"] <= high


def test_gates_leave_three_pictures(run: Path) -> None:
    names = sorted(path.stem for path in (run / "scores").glob("*.png"))
    assert names == ["predicted_against_true", "r2_by_head", "r2_by_layer"]


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    main(["report", "--run", str(run), "--out", str(run), "--score_from", "16"])
    return json.loads((run / "report.json").read_text())


def test_the_report_has_what_it_promises(report: dict[str, Any], scores: dict[str, Any], run: Path) -> None:
    assert report["heads"] == 4
    assert report["tokens_harvested"] == 10 * 64
    assert report["texts"][0]["name"] == "mine"
    for name in ("r2_mean", "r2_median", "r2_token_table"):
        assert report[name] == scores[name]
    assert GateBank.from_pretrained(report["gates"])
    assert load_backbone(report["model"])


def test_nll_full_is_the_frozen_models_on_the_validation_windows(report: dict[str, Any], run: Path) -> None:
    manifest = Manifest.read(run / "shards")
    model = load_backbone(manifest.arguments["backbone"], "float32").model
    rows = LabelledKeys(manifest)
    total, count = 0.0, 0
    for entry in manifest.of_split("validation"):
        from safetensors.torch import load_file

        for tokens in load_file(rows.manifest.folder / entry.file)["token"].view(-1, manifest.window).long():
            with torch.no_grad():
                logs = model(tokens[None]).logits[0].log_softmax(dim=-1)
            total -= float(logs[15:-1].gather(1, tokens[16:, None]).sum())
            count += manifest.window - 16
    assert report["nll_full"] == pytest.approx(total / count, rel=1e-5)


def test_a_report_that_is_there_is_shown_again(
    run: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "report.json").stat().st_mtime_ns
    main(["report", "--run", str(run), "--out", str(run), "--reuse", "true"])
    assert (run / "report.json").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert f"mean R² {report['r2_mean']:.3f}" in shown and "r2_by_layer.png" in shown


def test_the_report_has_the_frontier_of_gates_and_window(report: dict[str, Any], run: Path) -> None:
    measured = json.loads((run / "perplexity/perplexity.json").read_text())["frontier"]
    assert [row["policy"] for row in report["frontier"]] == ["all-gated"] * 3 + ["window"] * 3
    for row, point in zip(report["frontier"], measured, strict=True):
        assert set(row) == {"policy", "footprint", "delta_nll", "peak_bytes", "peak_bytes_full"}
        assert all(row[name] == point[name] for name in row)


def test_the_report_ends_with_what_was_won(
    run: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", "--run", str(run), "--out", str(run), "--reuse", "true"])
    shown = capsys.readouterr().out
    assert "What is lost when keys are evicted" in shown and "frontier.png" in shown


def scored(gates: GateBank, run: Path, folder: Path) -> dict[str, Any]:
    gates.save_pretrained(folder / "gates")
    main(["gates", "--gates", str(folder / "gates"), "--shards", str(run / "shards"), "--out", str(folder)])
    return json.loads((folder / "gates.json").read_text())


def test_gates_whose_score_has_no_r2_have_none_and_are_measured_by_their_order(
    run: Path, scores: dict[str, Any], tmp_path: Path
) -> None:
    gates = GateBank.from_pretrained(run / "gates" / "export")
    gates.details |= {"target": "log worth"}
    found = scored(gates, run, tmp_path)
    assert found["r2_mean"] is None and not (tmp_path / "r2_by_head.png").exists()
    assert found["order"]["scores"] == scores["order"]["scores"]  # the same weights put keys in the same order


def test_order_is_that_of_the_scores_on_each_window(run: Path, scores: dict[str, Any], rows: LabelledKeys) -> None:
    gates, order = GateBank.from_pretrained(run / "gates" / "export"), scores["order"]["scores"]
    pairs, held, best = [], [], []
    for block in rows.blocks("validation"):
        with torch.no_grad():
            score = gates(rows.keys(block).float())[..., 0]
        labels = rows.labels(block)
        pairs.append(float(concordance(score, labels.log4_lifespan).nanmean()))
        future = labels.future_attention[0]
        future, score = (part[:, ~future.isnan().any(dim=0)] for part in (future, score))
        held.append(float(top_share(score, future, 0.25)[1]))
        best.append(float(top_share(future, future, 0.25)[1]))
    assert order["gates"]["concordance"]["mean"] == pytest.approx(sum(pairs) / len(pairs))
    assert order["gates"]["top_25_all"]["mean"] == pytest.approx(sum(held) / len(held))
    assert order["oracle"]["top_25_all"]["mean"] == pytest.approx(sum(best) / len(best))
    assert order["constant"]["concordance"]["mean"] == 0.5
    for name in ("gates", "token_table", "position", "constant", "random"):
        assert order[name]["top_10"]["mean"] < order["oracle"]["top_10"]["mean"]


def test_ordinal_gates_are_calibrated_against_what_happened(run: Path, rows: LabelledKeys, tmp_path: Path) -> None:
    trained = GateBank.from_pretrained(run / "gates" / "export")
    gates = GateBank(trained.fingerprint, hidden=4, outputs=2, details=trained.details)
    gates.details = trained.details | {"target": OrdinalAges.target, "objective": {"ages": [4, 16]}}
    found = scored(gates, run, tmp_path)["calibration"]
    target = whole_split(rows, "validation")[1]
    lived = [float((target > log4).double().mean()) for log4 in (1.0, 2.0)]
    for age in range(2):
        counts, shares = found["keys"][age], found["happened"][age]
        total = sum(n * share for n, share in zip(counts, shares, strict=True) if n)
        assert total / sum(counts) == pytest.approx(lived[age], abs=1e-6)
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_a_report_of_gates_without_r2_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("shards", "gates", "perplexity"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "gates.json").write_text(json.dumps({"r2_mean": None}))
    with pytest.raises(SystemExit):
        main(["report", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "have no R²" in capsys.readouterr().err
