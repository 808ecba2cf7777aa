"""The tables of `python -m eval budgets`."""

import io
from dataclasses import replace

from rich.console import Console

from eval.eviction.budgets_report import BudgetRow, LongerRow, kept_table, loss_table

ROW = BudgetRow(
    kind="books",
    length=1024,
    asked=0.25,
    held=[0.249, 0.25],
    held_fixed=[0.25, 0.252],
    footprint=0.31,
    footprint_fixed=0.29,
    delta_nll=[0.01, 0.03],
    delta_nll_fixed=[0.02, 0.06],
    interval=(0.01, 0.03),
    interval_fixed=(0.02, 0.06),
    ratio=0.5,
    ratio_interval=(0.4, 0.6),
    difference_interval=(-0.03, -0.01),
    nll_full=2.0,
    documents=2,
)


def shown(table: object) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(table)
    return text.getvalue()


def test_kept_shows_the_range_of_windows_and_what_twice_the_plan_holds() -> None:
    rows = [ROW, replace(ROW, asked=0.125, held=[0.125, 0.1251])]
    text = shown(kept_table(rows, [LongerRow("books", 1024, 2047, 0.25, [0.26])], "model"))
    assert "0.2490–0.2500" in text and "0.1250–0.1251" in text and "× 1.040–1.040" in text


def test_losses_stand_side_by_side_with_their_ratio() -> None:
    text = shown(loss_table([ROW], "model"))
    assert "+0.0400 (+0.0200 to +0.0600)" in text and "+0.0200 (+0.0100 to +0.0300)" in text
    assert "0.50 (0.40 to 0.60)" in text


def test_no_ratio_is_shown_where_the_fixed_price_may_lose_nothing() -> None:
    assert "0.50" not in shown(loss_table([replace(ROW, interval_fixed=(-0.01, 0.06))], "model"))
