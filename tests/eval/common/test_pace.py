"""Progress lines and the estimate of the time that is left."""

import io

from rich.console import Console

from eval.common.pace import Pace


def test_the_time_left_comes_from_what_was_measured_in_this_run() -> None:
    console, now = Console(file=io.StringIO(), width=120), [0.0]
    with Pace(console, "ruler", [100.0, 100.0, 400.0, 600.0], clock=lambda: now[0]) as pace:
        pace.describe("vt 4,096 tokens: gates at 0.25")
        pace.advance(100, None)  # was there already
        assert pace.time_left == ""
        now[0] = 30.0
        pace.advance(100, 30)  # 0.3 seconds a unit of work: 300 seconds for the rest
        assert pace.time_left == "about 5 min left"
        assert console.file.getvalue() == ""  # no line yet
        now[0] = 150.0
        pace.advance(400, 3600)
        assert pace.time_left == "about 1 h 13 min left"
    lines = console.file.getvalue().splitlines()
    assert lines[0] == ("ruler: 3 of 4 measured; vt 4,096 tokens: gates at 0.25; 1815.0 s each; about 1 h 13 min left")
    assert lines[1].startswith("ruler: 3 of 4 measured")


def test_a_terminal_gets_a_bar_in_place_of_lines() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Pace(console, "ruler", [1.0, 1.0]) as pace:
        pace.advance(1, 120)
    shown = console.file.getvalue()
    assert "1/2" in shown and "about 2 min left" in shown and "measured" not in shown
