"""Contenders beside the full cache on the same samples."""

from typing import Any

from eval.tasks.paired import all_beside_full, beside_full, paired_table
from eval.tasks.report import Row


def row(contender: str, scores: list[float | None], target: float = 0.25, clusters: list[str] | None = None) -> Row:
    names = clusters or [None] * len(scores)
    samples = [
        {"group": ("a",), "score": score, "nll": 1.0 + number} | ({"cluster": name} if name else {})
        for number, (score, name) in enumerate(zip(scores, names, strict=True))
    ]
    return Row(contender, "full" if contender == "full" else "ours", "keys", target, 100, None, samples)


FULL = row("full", [1.0, 0.5, 1.0, 0.0], 1.0)


def test_ratio_and_difference_are_those_of_the_same_samples() -> None:
    found = beside_full(row("gates", [1.0, 0.0, 0.25, 0.0]), FULL, "score")
    assert found is not None
    assert (found["samples"], found["mean"], found["full"]) == (4, 0.3125, 0.625)
    assert found["ratio"] == 0.5 and found["difference"] == -0.3125
    assert (found["kept_where_full_is"], found["of"]) == (0.5, 2)  # above a half counts as right
    low, high = found["ratio_95"]
    assert 0 <= low < 0.5 < high <= 1.0 and found["difference_95"][1] <= 0
    same = beside_full(row("gates", [1.0, 0.5, 1.0, 0.0]), FULL, "score")
    assert same is not None and same["ratio_95"] == [1.0, 1.0] and same["difference_95"] == [0.0, 0.0]


def test_a_loss_has_no_ratio_and_nothing_to_keep() -> None:
    found = beside_full(row("gates", [1.0] * 4), FULL, "nll")
    assert found is not None and found["ratio"] is None and found["difference"] == 0.0
    assert "kept_where_full_is" not in found


def test_samples_without_the_figure_and_groups_that_were_left_out_do_not_count() -> None:
    assert beside_full(row("gates", [None] * 4), FULL, "score") is None
    found = beside_full(row("gates", [None, 1.0, 1.0, 1.0]), FULL, "score")
    assert found is not None and found["samples"] == 3 and found["full"] == 0.5
    assert beside_full(row("gates", [1.0]), FULL, "score") is None  # of a group of four


def test_the_interval_draws_whole_clusters() -> None:
    """One cluster: every draw is the same, so there is no spread."""
    full, own = row("full", [1.0, 1.0], 1.0, ["p", "p"]), row("gates", [1.0, 0.0], clusters=["p", "p"])
    found = beside_full(own, full, "score")
    assert found is not None and found["ratio_95"] == [0.5, 0.5]
    apart = beside_full(row("gates", [1.0, 0.0], clusters=["p", "q"]), full, "score")
    assert apart is not None and apart["ratio_95"] == [0.0, 1.0]


def test_the_table_has_a_line_for_each_contender_with_figures() -> None:
    def cells(table: Any, column: int) -> list[str]:
        return list(table.columns[column].cells)

    none = row("mask", [None] * 4)
    compared = all_beside_full([FULL, row("gates", [1.0, 0.0, 0.25, 0.0]), none], ["score"])
    assert [line["contender"] for line in compared] == ["gates", "mask"] and compared[1]["score"] is None
    table = paired_table("t", compared, {"score": "said"})
    assert cells(table, 0) == ["gates 0.25"] and cells(table, 2) == ["said"] and cells(table, 7) == ["1 of 2"]
    assert cells(table, 5)[0].startswith("0.50 [") and cells(table, 6)[0].startswith("-0.31 [")
    zero = paired_table("t", all_beside_full([row("full", [0.0], 1.0), row("x", [0.0])], ["score"]), {"score": "said"})
    assert cells(zero, 5) == [""] and cells(zero, 7) == ["0 of 0"]
