"""Table, page and picture of `python -m eval decode`."""

from typing import Any

import pytest

from eval.common.contender_styles import STYLES
from eval.speed.decode_report import COLUMNS, NAMES, decode_picture, decode_table, markdown, rows

FIGURE: dict[str, Any] = {
    "context": 4096,
    "batch": 8,
    "ms_per_token": {"smartkv": 20.0, "dynamic": 80.0, "static": 30.0, "smartkv_full": 50.0},
    "prefill": {"smartkv": 300.0, "dynamic": 200.0},
    "limit_by_bytes": 2.0,
    "gates_share_of_decode": 0.001,
    "gates_share_of_prefill": 0.01,
    "share_of_full": 0.25,
    "bytes": 110,
    "live_bytes": 100,
    "peak_bytes": 121,
}


def test_ratios_say_how_many_times_as_fast_smartkv_is() -> None:
    (row,) = rows([FIGURE])
    assert row[:2] == ["4,096", "8"] and row[3:6] == ["4.00", "1.50", "2.50"]
    assert row[8] == "1.50" and row[-2:] == ["1.100", "1.10"]


def test_the_table_has_a_column_for_each_heading() -> None:
    assert [column.header for column in decode_table([FIGURE]).columns] == list(COLUMNS)


def test_the_page_has_the_machine_and_every_way_s_milliseconds() -> None:
    arguments = dict.fromkeys(("backbone", "dtype", "policy", "footprint", "gates", "rounds", "steps"), "x")
    page = markdown(arguments | {"machine": {"processor": "mine"}}, [FIGURE])
    assert "Machine: processor mine." in page and page.endswith("| 4,096 | 8 | 20.0 | 80.0 | 30.0 | 50.0 |\n")


def test_the_picture_has_a_panel_a_batch_and_a_line_a_way_by_context() -> None:
    figure = decode_picture([FIGURE, FIGURE | {"context": 1024}, FIGURE | {"batch": 1}])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one sequence", "8 sequences"]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert set(lines) == {STYLES[way].label for way in NAMES}
    assert lines["SmartKV"].get_xdata() == pytest.approx([1024, 4096])
