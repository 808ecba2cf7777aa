"""Files that are there are whole: written under another name, synced, renamed."""

import os
import tempfile
from pathlib import Path

from smartkv.errors import SmartKVError

PART = ".part"  # how files end that are being written


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, on the same disk, sync, rename: readers see the old file, the new one, or none, whenever the
    process or the machine stops.

    Raises:
        SmartKVError: the folder cannot be written to, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private, results are not
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise SmartKVError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def delete_partial_files(folder: Path, name: str = "*") -> None:
    """Delete what killed runs left half written in `folder` (of files called `name`). For who alone writes there."""
    for left in folder.glob(f".{name}.*{PART}"):
        left.unlink(missing_ok=True)
