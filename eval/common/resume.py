"""Measured figures on disk, so that a run that was killed goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.common.results import read_result
from smartkv.gates.bank import GateBank
from smartkv.io.atomic import write_atomically
from smartkv.io.locks import lock_folder

SAMPLED = 256  # elements of each weight that count for the digest of a model


class Measurements:
    """Measured figures of one command in one file. A figure in the file is not measured again.

    Args:
        path: of the JSON file. Its folder is locked, because a second run would overwrite the figures of the first.
        settings: of the run, fit for JSON. Figures of other settings stay in the file and are not read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        lock_folder(path.parent)
        self.path, self.settings = path, settings
        self.done: dict[str, Any] = read_result(path) if path.exists() else {}

    def measured(self, key: Any, measure: Callable[[], Any]) -> Any:
        """Return the figures of a key: from the file, or measured now and added to the file.

        Args:
            key: identifies the measurement within the settings; fit for JSON.
            measure: returns the figures, fit for JSON.
        """
        name = hashlib.sha256(json.dumps([self.settings, key], sort_keys=True).encode()).hexdigest()[:24]
        if name not in self.done:
            self.done[name] = measure()
            write_atomically(self.path, json.dumps(self.done).encode())
        return self.done[name]


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's content, 16 hexadecimal digits."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def digest_of_model(model: nn.Module) -> str:
    """Return a digest of a model's weights, 16 hexadecimal digits.

    About `SAMPLED` evenly spread elements of each weight count. Any training changes them, and a large model is not
    read whole.
    """
    total = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].float().cpu()
        total.update(f"{name} {tuple(weight.shape)} {digest(sample)}".encode())
    return total.hexdigest()[:16]


def digests(gates: GateBank | None) -> dict[str, str]:
    """Return the digest of each weight of the gates; nothing without gates."""
    return {} if gates is None else {name: digest(weight) for name, weight in sorted(gates.state_dict().items())}
