"""One file of a harvest: a shard, or the plan of its windows.

Its header says what it is, with a digest of that and of all tensors: a harvest that was killed has no manifest yet, and
goes on with what it finds only if that is what was written. Files of earlier versions have no digest.
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

DIGEST = "sha256"  # where the header has it


class DamagedFile(SmartKVError):
    """A file that is there and is not whole."""


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write one file. Equal tensors and metadata give equal bytes.

    The header holds `metadata` and the digest as JSON under the one key `smartkv`: safetensors writes several keys in
    random order.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    said = metadata | {DIGEST: _digest(metadata, sorted(tensors.items()))}
    write_atomically(path, save(tensors, metadata={"smartkv": json.dumps(said, sort_keys=True)}))


def read_header(path: Path) -> dict[str, Any]:
    """The metadata that a file was written with.

    Raises:
        DamagedFile: not whole.
        SmartKVError: not there, not to be read, or not one of ours.
    """
    with open_tensors(path) as file:
        return _said(path, file)[0]


def digests(path: Path) -> tuple[str | None, str]:
    """The digest that a file's header has (None: it has none), and that of what the file holds. Reads it whole.

    Raises: as `read_header`.
    """
    with open_tensors(path) as file:
        metadata, digest = _said(path, file)
        try:
            return digest, _digest(metadata, ((name, file.get_tensor(name)) for name in sorted(file.keys())))
        except SafetensorError as error:
            raise _damaged(path, error) from error


def open_tensors(path: Path) -> Any:
    """An open safetensors file (a context manager).

    Raises:
        DamagedFile: not whole.
        SmartKVError: not there, or not to be read.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise SmartKVError(f"{path} is missing: run the same harvest again, it makes what is not there") from error
    except SafetensorError as error:
        raise _damaged(path, error) from error
    except OSError as error:  # of the disk, not of the file: it may pass
        raise SmartKVError(f"{path} could not be read: {error}") from error


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(f"{path} is damaged ({error}): run the same harvest again, it makes that file anew")


def _said(path: Path, file: Any) -> tuple[dict[str, Any], str | None]:
    """A header's metadata and digest."""
    try:
        metadata = check_type("smartkv", json.loads((file.metadata() or {})["smartkv"]), dict)
    except (KeyError, ValueError) as error:
        raise SmartKVError(
            f"{path} is a safetensors file, but not one that SmartKV wrote: move it away, or take another folder"
        ) from error
    return metadata, metadata.pop(DIGEST, None)


def _digest(metadata: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of metadata and tensors. Of what they hold, not of the file: the file holds the digest."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
