"""The console that commands print to."""

import sys
from collections.abc import Callable

from rich.console import Console


def make_console() -> Console:
    """Make a console; where the output is no terminal it is 120 characters wide, so that tables fit."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def say_once(console: Console) -> Callable[[str], None]:
    """Make a function that prints a line unless it has printed it before, such as the origin of a text."""
    printed: set[str] = set()

    def say(line: str) -> None:
        if line not in printed:
            printed.add(line)
            console.print(line, highlight=False)

    return say
