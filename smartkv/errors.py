"""The one error a user of SmartKV meets: what was expected, what came, what to do; and how commands say it."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.multiprocessing import ProcessRaisedException

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # of disks and folders


class SmartKVError(Exception):
    """A mistake in what was given (a file, a config key, a model), told in one line.

    The commands print it without a traceback and exit with status 2. It is no ValueError, because jsonargparse takes
    a ValueError from a constructor for a value of the wrong type and hides what it says.
    """


class FootprintOutOfReach(SmartKVError):
    """A policy or a contender cannot keep the share of the cache that was asked for.

    Commands that measure several footprints leave this one out and go on; anything else that is wrong ends them.
    """


def error_line(error: Exception) -> str | None:
    """What is said in a line of a mistake, of one in a forked process, of a full disk or of a folder that is not ours;
    None: the error is another."""
    if isinstance(error, SmartKVError):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"{error.filename or 'a file'} could not be written: {error.strerror}"
    if isinstance(error, ProcessRaisedException):  # its message is the other process's traceback
        names = "|".join(f"{kind.__module__}.{kind.__qualname__}" for kind in _kinds(SmartKVError))
        found = re.search(rf"^(?:{names}): (.*)", str(error), re.MULTILINE)
        return found and found[1]
    return None


def _kinds(error: type[Exception]) -> list[type[Exception]]:
    """The class and all that derive from it."""
    return [error, *(kind for derived in error.__subclasses__() for kind in _kinds(derived))]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a command runs in: an error that can be told ends it with one line on stderr and status 2."""
    try:
        yield
    except Exception as error:
        said = error_line(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
