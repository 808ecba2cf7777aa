"""Rows of tasks and tables of them."""

from typing import Any

import pytest

from eval.tasks.report import (
    Row,
    all_lengths,
    counted,
    full_of,
    group_table,
    mean,
    merged,
    right_where_full_is,
    score_table,
    shown,
)


def row(contender: str, length: int, rights: dict[str, float | None], kind: str = "rule", target: float = 0.5) -> Row:
    samples = [
        {"group": (group, length), "right": right, "nll": 1.0, "footprint": 0.5, "stored": None}
        for group, right in rights.items()
    ]
    return Row(contender, kind, "nothing", target, length, None, samples)


FULL = [row("full", length, {"a": 1.0, "b": 0.0}, "full", 1.0) for length in (100, 200)]


def cells(table: Any, column: int) -> list[str]:
    return list(table.columns[column].cells)


def test_a_mean_is_over_what_is_known() -> None:
    assert mean([1, None, 2.0, True]) == pytest.approx(4 / 3) and mean([None]) is None and mean([]) is None


def test_rows_of_one_contender_footprint_and_length_become_one() -> None:
    rows = merged([row("x", 100, {"a": 1.0}), row("x", 100, {"b": 0.0}), row("x", 200, {"a": 1.0})])
    assert [(each.length, len(each.samples)) for each in rows] == [(100, 2), (200, 1)]


def test_right_is_counted_among_what_the_full_cache_gets_right() -> None:
    assert right_where_full_is(row("x", 100, {"a": 0.0, "b": 1.0}), FULL[0], "right") == (0.0, 1)
    assert right_where_full_is(row("x", 100, {"a": 1.0}), FULL[0], "right", "b") == (None, 0)
    assert right_where_full_is(FULL[0], FULL[0], "right") == (1.0, 1)


def test_a_group_that_was_not_read_whole_leaves_the_means_over_all_lengths() -> None:
    short = row("x", 100, {"a": 1.0, "b": 1.0})
    short.samples[0]["group"] = full_group = ("a", 100)
    together = {each.contender: each for each in all_lengths([*FULL, short])}
    assert len(together["full"].samples) == 4 and len(together["x"].samples) == 2
    short.samples.append(dict(short.samples[0]))  # one more than the full cache read
    together = {each.contender: each for each in all_lengths([*FULL, short])}
    assert [sample["group"] for sample in together["x"].samples] == [("b", 100)] and full_group[0] == "a"


def test_tables_have_a_line_for_each_row_or_group() -> None:
    rows = [FULL[0], row("x", 100, {"a": 0.5, "b": 1.0})]
    assert full_of(rows, 100) is FULL[0]
    groups = group_table("t", rows, ["a", "b"], "right")
    assert cells(groups, 0)[:2] == ["a", "b"] and cells(groups, 2)[:3] == ["0.50", "1.00", "0.750"]
    scores = score_table("t", ("right",), [(each, ("yes",)) for each in rows])
    assert cells(scores, 0) == ["full", "x"] and cells(scores, 2) == ["mask", "mask"]


def test_figures_are_formatted_for_cells() -> None:
    assert (shown(0.256), shown(0.256, 1), shown(0.256, percent=True), shown(None)) == ("0.26", "0.3", "26%", "")
    assert counted(13 / 15, 15) == "13 of 15" and counted(None, 0) == "0 of 0"
    assert row("x", 1, {}).label == "x 0.5" and FULL[0].label == "full"
