"""The console of all commands."""

import io

from rich.console import Console

from eval.common.console import make_console, say_once


def test_the_console_is_wide_enough_for_our_tables_where_the_output_is_a_file() -> None:
    assert make_console().width == 120


def test_a_line_is_said_once() -> None:
    output = io.StringIO()
    say = say_once(Console(file=output, width=80))
    for line in ("source 'pg19': local", "source 'gsm8k' CANNOT BE HAD", "source 'pg19': local"):
        say(line)
    assert output.getvalue().splitlines() == ["source 'pg19': local", "source 'gsm8k' CANNOT BE HAD"]
