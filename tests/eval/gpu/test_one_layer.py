"""Attention of one layer by each way."""

from unittest.mock import patch

import torch

from eval.gpu.one_layer import one_layer
from eval.gpu.shapes import TINY
from smartkv.cache.paged import Pages

CPU = torch.device("cpu")


def test_the_pages_are_right_and_a_kernel_that_lacks_is_noted() -> None:
    pages, *ranges, flash, dense = one_layer(TINY["tiny Llama"], 2, 128, 0.25, CPU, torch.float32)
    assert pages["error"] < 1e-5 and pages["microseconds"] > 0
    assert [row["way"] for row in ranges] == [f"SmartKV, ranges in {parts} parts" for parts in (1, 8, 16)]
    assert all(row["note"] == "needs a GPU with Triton" for row in ranges)
    assert flash.keys() == {"way", "note"} and "CPU" in flash["note"]
    assert dense["gb_per_s"] > 0 and dense["error"] is None


def test_a_wrong_result_is_no_figure() -> None:
    attend = Pages.attend
    with patch.object(Pages, "attend", lambda *arguments: 1.1 * attend(*arguments)):
        pages = next(one_layer(TINY["tiny Llama"], 1, 128, 0.25, CPU, torch.float32))
    assert pages.keys() == {"way", "note"} and pages["note"].startswith("wrong: relative error 0.1")
