"""Shares of facts recalled, by kind of text."""

from dataclasses import dataclass
from typing import Any

import pytest

from eval.eviction.recall_report import recall_share, recall_table, recalled_by_full
from smartkv.errors import SmartKVError


@dataclass
class Row:
    contender: str
    target: float
    recall: list[dict[str, Any]]


def row(name: str, **right: str) -> Row:
    """A row whose trials of each kind are right (+) or wrong (-)."""
    figures = {"nll": 1.0, "footprint": 0.25}
    return Row(name, 0.25, [figures | {"right": each == "+", "kind": kind} for kind in right for each in right[kind]])


FULL = row("full", books="++-", code="+-+", chat="++++")


def test_shares_are_by_kind_and_of_all() -> None:
    found = recall_share(row("mine", books="+-", code="++", chat="+-+-"), FULL)
    assert (found["asked"], found["right"]) == (8, pytest.approx(5 / 8))
    assert {kind: (share["asked"], share["right"]) for kind, share in found["kinds"].items()} == {
        "books": (2, 0.5),
        "code": (2, 1.0),
        "chat": (4, 0.5),
    }
    with pytest.raises(SmartKVError, match="was asked other facts"):
        recall_share(row("mine", books="+"), FULL)


def test_the_full_cache_is_judged_on_all_trials() -> None:
    found = recalled_by_full(FULL)
    assert found is not None and (found["asked"], found["right"]) == (10, pytest.approx(0.8))
    assert found["kinds"]["books"]["right"] == pytest.approx(2 / 3)
    assert recalled_by_full(row("full")) is None


def test_trials_of_older_results_are_in_books() -> None:
    older = Row("full", 1.0, [{"nll": 1.0, "footprint": 1.0, "right": True}])
    assert recall_share(older, older)["kinds"].keys() == {"books"}


def test_a_table_has_a_column_a_kind() -> None:
    mine = row("mine", books="+-", code="++", chat="+-+-")
    table = recall_table([mine], FULL, {id(mine): recall_share(mine, FULL)})
    assert table is not None and [column.header for column in table.columns] == [
        "",
        "footprint",
        "books",
        "code",
        "chat",
        "all",
    ]
    cells = [next(iter(column.cells)) for column in table.columns]
    assert [str(cell).partition(" ")[0] for cell in cells] == ["mine", "0.250", "50%", "100%", "50%", "62%"]
    assert "books 2 of 3, code 2 of 3, chat 4 of 4" in str(table.title)
    only = row("full", books="+")
    assert recall_table([only], only, {id(only): recall_share(only, only)}) is None
