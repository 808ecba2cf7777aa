"""The console of all commands."""

import sys
from collections.abc import Callable

from rich.console import Console


def make_console() -> Console:
    """A console that is wide enough for our tables where the output is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def say_once(console: Console) -> Callable[[str], None]:
    """A function that prints a line unless it has printed it before: where a text comes from is said once a run."""
    printed: set[str] = set()

    def say(line: str) -> None:
        if line not in printed:
            printed.add(line)
            console.print(line, highlight=False)

    return say
