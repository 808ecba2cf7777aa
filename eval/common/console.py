"""One console for all commands: wide enough for our tables where the output is no terminal."""

import sys

from rich.console import Console


def make_console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=120)
