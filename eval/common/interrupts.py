"""Ctrl-C ends a command with one line that says how to go on. Uses the standard library alone, so it works at once."""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import TracebackType

STEP = "SMARTKV_STEP"  # environment variable of a command that is a step of another one
STATUS = 130  # exit status of a command that Ctrl-C ended, as shells have it


def typed_command(args: Sequence[str] | None, program: Sequence[str]) -> list[str]:
    """Return the command that started this process.

    Args:
        args: arguments that a caller in Python gave in place of the command line; None: none.
        program: what stands before them, such as `python main.py`.
    """
    return list(sys.orig_argv) if args is None else [*program, *args]


def interrupted_line(command: Sequence[str], resumes: bool) -> str:
    """Return the line for a command that was interrupted.

    Args:
        command: what to type next.
        resumes: the command goes on where this one stopped; otherwise it begins again.
    """
    return f"interrupted: {'go on' if resumes else 'begin again'} with: {shlex.join(command)}"


def is_helper_process() -> bool:
    """Return whether another process of the same run tells of an interrupt."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def is_step() -> bool:
    """Return whether this command is a step of another one, which tells what comes next and how to go on."""
    return STEP in os.environ


def end_quietly() -> None:
    """Ignore Ctrl-C from here on in a step, whose work is done; what ended it stays as it is."""
    if is_step():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def quiet_interrupts(resumes: bool) -> None:
    """Replace the traceback of a Ctrl-C that nobody catches, such as one while modules are imported, by the line.

    Args:
        resumes: this process's command, given again, goes on where it stopped.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, traceback)
        elif not (is_helper_process() or is_step()):
            print(f"\n{interrupted_line(sys.orig_argv, resumes)}", file=sys.stderr)

    sys.excepthook = hook
