"""Settings of contenders that are remembered between runs."""

from pathlib import Path
from typing import Any

from eval.common.resume import Measurements
from eval.contenders.base import FullCache
from eval.contenders.policies import PolicyContender
from eval.contenders.solving import solved_setting
from smartkv.policies.budgets import Calibration
from smartkv.policies.named import read_policy
from tests.models import token_ids


def test_a_price_is_solved_once_for_the_same_texts_and_weights(tmp_path: Path, tiny_lm: Any, monkeypatch: Any) -> None:
    calls: list[int] = []

    def calibrate() -> Calibration:
        calls.append(1)
        return Calibration.measure(tiny_lm.model, None, [token_ids(64)], 16)

    contender = PolicyContender(tiny_lm, None, read_policy("window", tiny_lm.architecture.layers), calibrate)
    setting = contender.solved(0.5)
    for _ in range(2):
        cells = Measurements(tmp_path / "x.cells", {})
        assert solved_setting(cells, contender, 0.5, {"w": "1"}, "texts") == setting
    assert len(calls) == 2  # `contender.solved` above, and the first run
    solved_setting(cells, contender, 0.5, {"w": "2"}, "texts")  # a policy without gates does not depend on them
    assert len(calls) == 2
    solved_setting(cells, contender, 0.5, {}, "other texts")
    assert len(calls) == 3


def test_a_contender_that_is_no_policy_is_not_remembered(tmp_path: Path, tiny_lm: Any) -> None:
    cells = Measurements(tmp_path / "x.cells", {})
    assert solved_setting(cells, FullCache(tiny_lm), 1.0, {}, "") == 1.0 and cells.done == {}
