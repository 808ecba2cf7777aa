"""Reading and writing of single safetensors files of a harvest: shards, and the plan of windows.

The header of a file holds metadata and a digest of the metadata and all tensors. A harvest that was killed has no
manifest yet. When it is run again, it reuses a file only if the digest matches. Files of early versions have no digest.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically
from smartkv.io.checks import check_type

DIGEST = "sha256"  # key of the digest in the header


class DamagedFile(SmartKVError):
    """A file that exists but is not whole."""


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write one file atomically. Equal tensors and metadata give equal bytes.

    The header holds `metadata` and the digest as JSON under the single key `smartkv`, because safetensors writes
    several keys in random order.

    Args:
        path: File to write.
        tensors: Tensors by name.
        metadata: Anything that JSON can hold.

    Raises:
        SmartKVError: The file could not be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = metadata | {DIGEST: _digest(metadata, sorted(tensors.items()))}
    write_atomically(path, save(tensors, metadata={"smartkv": json.dumps(header, sort_keys=True)}))


def read_header(path: Path) -> dict[str, Any]:
    """Read the metadata that a file was written with.

    Raises:
        DamagedFile: The file is not whole.
        SmartKVError: The file is missing, unreadable, or was not written by SmartKV.
    """
    with open_tensors(path) as file:
        return _metadata_and_digest(path, file)[0]


def digests(path: Path) -> tuple[str | None, str]:
    """Compare a file with its digest. This reads the whole file.

    Returns:
        The digest in the header (None if there is none) and the digest of the content. They differ if the content was
        changed.

    Raises:
        DamagedFile: The file is not whole.
        SmartKVError: The file is missing, unreadable, or was not written by SmartKV.
    """
    with open_tensors(path) as file:
        metadata, digest = _metadata_and_digest(path, file)
        try:
            return digest, _digest(metadata, ((name, file.get_tensor(name)) for name in sorted(file.keys())))
        except SafetensorError as error:
            raise _damaged(path, error) from error


def open_tensors(path: Path) -> Any:
    """Open a safetensors file, as a context manager.

    Raises:
        DamagedFile: The file is not whole.
        SmartKVError: The file is missing or unreadable.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise SmartKVError(f"{path} is missing: run the same harvest again, it writes missing files") from error
    except SafetensorError as error:
        raise _damaged(path, error) from error
    except OSError as error:  # a fault of the disk, not of the file, which may pass
        raise SmartKVError(f"{path} could not be read: {error}") from error


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(f"{path} is damaged ({error}): run the same harvest again, it writes that file anew")


def _metadata_and_digest(path: Path, file: Any) -> tuple[dict[str, Any], str | None]:
    """Read a header's metadata and digest."""
    try:
        metadata = check_type("smartkv", json.loads((file.metadata() or {})["smartkv"]), dict)
    except (KeyError, ValueError) as error:
        raise SmartKVError(
            f"{path} is a safetensors file, but not one that SmartKV wrote: move it away, or choose another folder"
        ) from error
    return metadata, metadata.pop(DIGEST, None)


def _digest(metadata: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the SHA-256 of metadata and tensors; not of the file, which contains the digest itself."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
