"""Atomic writes: a file is written under a temporary name, synced and renamed, so that it is never half written."""

import os
import tempfile
from pathlib import Path

from smartkv.errors import SmartKVError

PART = ".part"  # suffix of a file that is being written


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is never seen half written, even if the process or the machine stops.

    The data goes to a temporary file in the same folder, is synced to the disk, and replaces `path` by a rename.

    Args:
        path: The file. Missing folders above it are made.
        data: Its content.

    Raises:
        SmartKVError: The folder cannot be written to, or the disk is full.
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
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private, these are not
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise SmartKVError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def delete_partial_files(folder: Path, name: str = "*") -> None:
    """Delete the temporary files that killed runs left in a folder.

    Call this only while no other process writes into the folder.

    Args:
        folder: The folder.
        name: Name, or glob pattern, of the files that were being written.
    """
    for temporary in folder.glob(f".{name}.*{PART}"):
        temporary.unlink(missing_ok=True)
