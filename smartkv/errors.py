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


def unwritable(error: OSError) -> str | None:
    """What is said of a full disk or a folder that is not ours; None: the error is another."""
    if error.errno not in UNWRITABLE:
        return None
    return f"{error.filename or 'a file'} could not be written: {error.strerror}"


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """What a command runs in: a user's mistake, or a disk or folder that cannot be written to, ends it with one line on
    stderr and status 2."""
    said: str | None
    try:
        yield
    except SmartKVError as error:
        said = str(error)
    except OSError as error:
        said = unwritable(error)
        if said is None:
            raise
    except ProcessRaisedException as error:  # of a forked process: its traceback is the message
        found = re.search(rf"^{__name__}\.SmartKVError: (.*)", str(error), re.MULTILINE)
        if found is None:
            raise
        said = found[1]
    else:
        return
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)
