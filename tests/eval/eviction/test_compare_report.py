"""The report of `python -m eval compare`: rows, ratios, recall."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from eval.common.console import make_console
from eval.common.resume import Measurements
from eval.contenders.registry import make_contenders
from eval.eviction.compare import Runner
from eval.eviction.compare_report import Row, recall_share, report
from eval.eviction.recall import Trial
from smartkv.errors import SmartKVError
from tests.models import token_ids

WINDOW, FIRST = 64, 20


def row(name: str, kind: str, footprint: float, nll: list[float], right: list[bool]) -> Row:
    texts = {"books": [{"nll": value, "footprint": footprint, "peak_bytes": None} for value in nll]}
    recall = [{"nll": 1.0, "footprint": footprint, "right": value} for value in right]
    return Row(name, kind, "keys", footprint, footprint, texts, recall)


FULL = row("full", "full", 1.0, [3.0, 2.0], [True, True, False, True])


def test_recall_is_the_share_of_what_the_full_cache_recalls() -> None:
    found = recall_share(row("mine", "ours", 0.2, [3.1, 2.1], [True, False, True]), FULL)
    assert found["asked"] == 3 and found["right"] == pytest.approx(2 / 3)
    with pytest.raises(SmartKVError, match="was asked other facts"):
        recall_share(row("mine", "ours", 0.2, [3.1, 2.1], [True] * 4), FULL)


def test_the_gap_to_the_oracle_and_to_the_window_are_plain_ratios(tmp_path: Path) -> None:
    rows = [
        FULL,
        row("mine", "ours", 0.25, [3.04, 2.06], [True] * 3),
        *(row("window", "rule", f, [3 + d, 2 + d], [False] * 3) for f, d in ((0.25, 0.1), (0.5, 0.05))),
        *(row("oracle:attention", "oracle", f, [3 + d, 2 + d], [True] * 3) for f, d in ((0.2, 0.02), (0.3, 0.02))),
        *(row(f"random:{seed}", "rule", 0.25, [3.2 + seed, 2.2], [seed == 0] * 3) for seed in (0, 1)),
    ]
    report(make_console(), tmp_path, {"backbone": "b", "window": 64, "device": "cpu"}, rows, {"books": [0, 1]})
    found = {(r["contender"], r["target"]): r for r in json.loads((tmp_path / "compare.json").read_text())["rows"]}
    mine = found["mine", 0.25]["texts"]["books"]
    assert mine["delta_nll"] == pytest.approx(0.05) and mine["ratio"] == pytest.approx(0.5)
    assert mine["gap_recovered"]["attention"] == pytest.approx((0.1 - 0.05) / (0.1 - 0.02))
    assert found["random", 0.25]["texts"]["books"]["delta_nll"] == pytest.approx(0.45)
    assert found["random", 0.25]["recall"]["right"] == 0.5
    assert (tmp_path / "recall.png").exists()


def test_nobody_is_asked_what_the_full_cache_cannot_recall(tmp_path: Path, tiny_lm: Any) -> None:
    ids = token_ids(60, 5).tolist()
    with torch.inference_mode():
        told = int(tiny_lm.model(torch.tensor([ids])).logits[0, -1].argmax())
    asked = [Trial(tuple(ids[:50]), tuple(ids[50:]), (answer,), 0.5) for answer in (told + 1, told, told + 2)]
    contenders = make_contenders(["window"], tiny_lm, None, [token_ids(60, 6)], FIRST)
    with Progress() as progress:
        runner = Runner(Measurements(tmp_path / "cells", {}), progress, FIRST, None, {}, "")
        full, window = runner.run(contenders, [0.8], [0.8], {}, asked)
    assert [trial["right"] for trial in full.recall] == [False, True, False]
    assert len(window.recall) == 1 and recall_share(window, full)["asked"] == 1
