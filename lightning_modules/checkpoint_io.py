"""Checkpoints as files that are whole or not there, and that hold nothing but numbers."""

import io
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from smartkv.errors import SmartKVError
from smartkv.io.atomic import delete_partial_files, write_atomically

PARTS = ("state_dict", "pytorch-lightning_version")  # what every checkpoint of Lightning's has


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """A checkpoint of Lightning's; nothing in it is run.

    Raises:
        SmartKVError: it is missing, damaged, no checkpoint of Lightning's, or holds more than numbers.
    """
    checkpoint = _load(path, "cpu")
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in PARTS):
        raise SmartKVError(f"{path} is no checkpoint of a training: it lacks {' or '.join(PARTS)}")
    return checkpoint


def _load(path: Path | str, map_location: Any) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise SmartKVError(f"there is no checkpoint {path}: give the path of one, or 'last'") from error
    except UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise SmartKVError(
                f"the checkpoint {path} holds more than numbers and is not loaded: it could run code"
            ) from error
        raise _damaged(path, error) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path | str, error: Exception) -> SmartKVError:
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return SmartKVError(f"{path} is damaged, or no checkpoint ({said}): give another one")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own go through a folder for temporary files: where that is on another disk, a run that is killed
    while the file is copied has lost the checkpoint before too. These are written beside the one they replace."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        delete_partial_files(path.parent, path.name)
        buffer = io.BytesIO()  # torch.save hides what the disk says
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getbuffer())

    def load_checkpoint(
        self, path: Path | str, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return _load(path, map_location)  # also what processes that were forked hand back: weights alone
