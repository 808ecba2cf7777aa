"""Locks on folders: one run at a time writes into a folder."""

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from smartkv.errors import SmartKVError
from smartkv.io.atomic import delete_partial_files

log = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP)  # from file systems without locks
_locks: dict[Path, FileLock] = {}


def lock_folder(folder: Path | str) -> None:
    """Lock a folder until this process ends, and delete the partial files that killed runs left in it.

    The operating system releases the lock however the process ends. Locking a folder again in the same process has no
    effect. On a file system without locks a warning is logged and nothing is locked or deleted.

    Args:
        folder: The folder. It is made if it is missing.

    Raises:
        SmartKVError: Another process has locked the folder, or it cannot be written to.
    """
    path = Path(folder).resolve()
    if path in _locks:
        return
    lock = FileLock(path / LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise SmartKVError(
            f"another run is writing into {folder}: let it end, or give this one another folder"
        ) from error
    except (NotImplementedError, OSError) as error:  # filelock 3 turns ENOSYS into NotImplementedError
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise SmartKVError(f"{folder} cannot be written to: {error.strerror or error}") from error
        log.warning("%s is on a file system without locks: see to it that no other run writes into it", folder)
        return
    _locks[path] = lock
    delete_partial_files(path)
