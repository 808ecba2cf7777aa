"""One run at a time writes into a folder."""

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from smartkv.errors import SmartKVError
from smartkv.io.atomic import delete_partial_files

log = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks say
_locks: dict[Path, FileLock] = {}


def lock_folder(folder: Path | str) -> None:
    """Keep other processes from holding this folder until this process ends, however it ends, and delete what killed
    ones left half written in it. Holding it again is nothing.

    Raises:
        SmartKVError: another process holds it, or the folder cannot be written to.
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
    except (NotImplementedError, OSError) as error:  # the first: what filelock 3 makes of ENOSYS
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise SmartKVError(f"{folder} cannot be written to: {error.strerror or error}") from error
        log.warning("%s is on a file system without locks: see to it that no other run writes into it", folder)
        return
    _locks[path] = lock
    delete_partial_files(path)
