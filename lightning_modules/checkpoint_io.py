"""Checkpoint files that are written atomically and loaded without running code."""

import io
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from smartkv.errors import SmartKVError
from smartkv.io.atomic import delete_partial_files, write_atomically

REQUIRED_KEYS = ("state_dict", "pytorch-lightning_version")  # of every checkpoint that Lightning writes


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a Lightning checkpoint onto the CPU without running code in it.

    Args:
        path: local file.

    Returns:
        The checkpoint's dictionary.

    Raises:
        SmartKVError: the file is missing, damaged or no Lightning checkpoint, or holds objects that could run code.
    """
    checkpoint = _load(path, "cpu")
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in REQUIRED_KEYS):
        raise SmartKVError(f"{path} is no checkpoint of a training: it lacks {' or '.join(REQUIRED_KEYS)}")
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
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return SmartKVError(f"{path} is damaged, or no checkpoint ({reason}): give another one")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with atomic local writes and safe loading.

    Lightning writes a checkpoint to a temporary folder and moves it. If that folder is on another disk, a run that is
    killed during the copy has also lost the previous checkpoint. This plugin writes the temporary file into the
    checkpoint's own folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None) -> None:
        """Write a checkpoint atomically; remote paths and storage options are left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        delete_partial_files(path.parent, path.name)
        buffer = io.BytesIO()  # torch.save on a path hides the disk's errors
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getbuffer())

    def load_checkpoint(
        self, path: Path | str, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without running code in it; remote paths are left to Lightning."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return _load(path, map_location)  # no check of keys: forked processes hand back a file of weights alone
