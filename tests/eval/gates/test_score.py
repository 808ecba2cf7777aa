"""`python -m eval gates`: figures against plain recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.functional import r2_score

from eval.__main__ import main
from smartkv import GateBank
from smartkv.gates.objectives import OrdinalAges
from smartkv.shards.labelled_keys import LabelledKeys
from tests.eval.gates.fixtures import whole_split


def test_r2_is_that_of_the_exported_gates_on_all_validation_keys(
    demo_run: Path, demo_scores: dict[str, Any], demo_rows: LabelledKeys
) -> None:
    keys, target = whole_split(demo_rows, "validation")
    with torch.no_grad():
        prediction = GateBank.from_pretrained(demo_run / "gates" / "export")(keys.float())[..., 0]
    expected = r2_score(prediction.double().T, target.double().T, multioutput="raw_values")
    assert list(demo_scores["r2_head"]) == ["L00H0", "L00H1", "L01H0", "L01H1"]
    assert list(demo_scores["r2_head"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert demo_scores["r2_mean"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert demo_scores["r2_median"] == pytest.approx(float(expected.median()), abs=1e-6)


def test_the_exported_figure_is_the_one_that_fit_logged(demo_run: Path, demo_scores: dict[str, Any]) -> None:
    config = json.loads((demo_run / "gates" / "export" / "config.json").read_text())
    assert config["details"]["metrics"]["val_r2_mean"] == pytest.approx(demo_scores["r2_mean"], abs=1e-4)


def test_the_constant_null_is_the_mean_of_the_training_labels(
    demo_scores: dict[str, Any], demo_rows: LabelledKeys
) -> None:
    _, train = whole_split(demo_rows, "train")
    _, target = whole_split(demo_rows, "validation")
    constant = train.mean(dim=1, keepdim=True).expand_as(target)
    expected = r2_score(constant.double().T, target.double().T, multioutput="raw_values")
    assert list(demo_scores["r2_head_nulls"]["constant"].values()) == pytest.approx(expected.tolist(), abs=1e-4)


def test_every_null_stands_beside_the_gates(demo_scores: dict[str, Any]) -> None:
    assert set(demo_scores["r2_nulls"]) == {"constant", "position", "token_table", "random"}
    assert demo_scores["r2_above_token_table"] == pytest.approx(demo_scores["r2_mean"] - demo_scores["r2_token_table"])
    low, high = demo_scores["r2_mean_interval_95"]
    assert low <= demo_scores["r2_mean"] <= high


def test_gates_leave_three_pictures(demo_run: Path) -> None:
    names = sorted(path.stem for path in (demo_run / "scores").glob("*.png"))
    assert names == ["predicted_against_true", "r2_by_head", "r2_by_layer"]


def scored(gates: GateBank, demo_run: Path, folder: Path) -> dict[str, Any]:
    gates.save_pretrained(folder / "gates")
    main(["gates", "--gates", str(folder / "gates"), "--shards", str(demo_run / "shards"), "--out", str(folder)])
    return json.loads((folder / "gates.json").read_text())


def test_gates_whose_score_has_no_r2_have_none_and_are_measured_by_their_order(
    demo_run: Path, demo_scores: dict[str, Any], tmp_path: Path
) -> None:
    gates = GateBank.from_pretrained(demo_run / "gates" / "export")
    gates.details |= {"target": "log worth"}
    found = scored(gates, demo_run, tmp_path)
    assert found["r2_mean"] is None and not (tmp_path / "r2_by_head.png").exists()
    assert found["order"]["scores"] == demo_scores["order"]["scores"]  # the same weights put keys in the same order


def test_ordinal_gates_are_calibrated_against_what_happened(
    demo_run: Path, demo_rows: LabelledKeys, tmp_path: Path
) -> None:
    trained = GateBank.from_pretrained(demo_run / "gates" / "export")
    gates = GateBank(trained.fingerprint, hidden=4, outputs=2, details=trained.details)
    gates.details = trained.details | {"target": OrdinalAges.target, "objective": {"ages": [4, 16]}}
    found = scored(gates, demo_run, tmp_path)["calibration"]
    target = whole_split(demo_rows, "validation")[1]
    lived = [float((target > log4).double().mean()) for log4 in (1.0, 2.0)]
    for age in range(2):
        counts, shares = found["keys"][age], found["happened"][age]
        total = sum(n * share for n, share in zip(counts, shares, strict=True) if n)
        assert total / sum(counts) == pytest.approx(lived[age], abs=1e-6)
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
