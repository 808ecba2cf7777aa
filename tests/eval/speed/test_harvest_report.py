"""Tables and picture of `python -m eval speed`."""

import pytest

from eval.common.contender_styles import STYLES
from eval.speed.harvest_report import growth_of, growth_table, harvest_picture, harvest_table

FAST = {"way": "smartkv", "tokens": 64, "tokens_per_second": 32.0, "seconds": [1.0, 2.0, 4.0], "peak_memory": 2**29}
SLOW = FAST | {"way": "output_attentions", "tokens_per_second": 8.0, "seconds": [4.0, 8.0, 8.0], "peak_memory": 2**30}


def test_speed_is_compared_round_by_round() -> None:
    table = harvest_table([FAST, SLOW])
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["× output_attentions"] == ["4.00", "1.00"]  # the median of 4, 4 and 2
    assert cells["÷ its peak"] == ["0.50", "1.00"] and cells["time ÷ forward"] == ["", ""]


def test_growth_is_read_off_all_lengths() -> None:
    rows = [
        {"way": "w", "tokens": n, "tokens_per_second": n / (3e-6 * n**1.5), "peak_memory": 10**8 + 700 * n}
        for n in (512, 1024, 2048, 8192)
    ]
    found = growth_of(rows, "w")
    assert (found["exponent"], found["bytes_a_token"]) == pytest.approx((1.5, 700)) and found["off_the_line"] < 1e-6
    rows[1]["peak_memory"] *= 2
    assert growth_of(rows, "w")["off_the_line"] > 0.2


def test_growth_needs_two_lengths_and_is_left_out_of_the_table_without() -> None:
    assert growth_of([FAST], "smartkv") == {}
    assert not growth_table({"smartkv": {}}).rows


def test_the_picture_has_a_line_a_way_of_what_could_be_measured() -> None:
    note = {"way": "output_attentions", "tokens": 128, "note": "needs 70 GiB"}
    speed, memory = harvest_picture([FAST, SLOW, FAST | {"tokens": 128}, note]).axes
    lines = {line.get_label(): line for line in memory.lines}
    assert lines[STYLES["smartkv"].label].get_ydata() == pytest.approx([0.5, 0.5])
    assert list(lines[STYLES["output_attentions"].label].get_xdata()) == [64]
    assert [label.get_text() for label in speed.get_xticklabels()] == ["64", "128"]
