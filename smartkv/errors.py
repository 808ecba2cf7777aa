"""The errors that SmartKV raises for a user's mistakes, and the one line in which a command prints them.

A message says what was expected, what came and what to do.
"""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.multiprocessing import ProcessRaisedException

UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
)  # the disk is full, or the place not writable


class SmartKVError(Exception):
    """A mistake in what the user gave: a file, a config key, a model.

    Commands print the message in one line, without a traceback, and exit with status 2. The class is no ValueError,
    because jsonargparse takes a ValueError from a constructor for a value of the wrong type and hides its message.
    """


class FootprintOutOfReach(SmartKVError):
    """A KV footprint that a policy or a contender cannot reach.

    Commands that measure several footprints skip such a footprint and go on. Any other SmartKVError ends them.
    """


def error_line(error: Exception) -> str | None:
    """Return the one line that tells a user of an error.

    A line exists for a SmartKVError, for one that ended a process started by `torch.multiprocessing`, and for an
    OSError in `UNWRITABLE`.

    Returns:
        The line, or None for any other error: its traceback is needed.
    """
    if isinstance(error, SmartKVError):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"{error.filename or 'a file'} could not be written: {error.strerror}"
    if isinstance(error, ProcessRaisedException):  # its message is the other process's traceback
        names = "|".join(f"{cls.__module__}.{cls.__qualname__}" for cls in _with_subclasses(SmartKVError))
        match = re.search(rf"^(?:{names}): (.*)", str(error), re.MULTILINE)
        return match and match[1]
    return None


def _with_subclasses(cls: type[Exception]) -> list[type[Exception]]:
    """Return the class and, recursively, all its subclasses."""
    return [cls, *(nested for subclass in cls.__subclasses__() for nested in _with_subclasses(subclass))]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context manager for a command: print an error with an `error_line` to stderr and exit with status 2.

    Any other error passes through.
    """
    try:
        yield
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
