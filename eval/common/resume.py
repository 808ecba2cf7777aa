"""Figures that take long: one file for all of a command's, so that a run that was killed goes on where it stopped."""

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

SAMPLED = 256  # figures of a weight that its model's digest is made of


class Measurements:
    """Measured figures; one that is there is not measured again.

    Args:
        path: of the file, JSON.
        settings: of the run, for JSON: figures of other settings are kept beside, and not read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        lock_folder(path.parent)  # another run's figures would be lost
        self.path, self.settings = path, settings
        self.done: dict[str, Any] = read_result(path) if path.exists() else {}

    def measured(self, key: Any, measure: Callable[[], Any]) -> Any:
        """The figures of `key` (anything for JSON), from the file, or from `measure`, which returns some for JSON."""
        name = hashlib.sha256(json.dumps([self.settings, key], sort_keys=True).encode()).hexdigest()[:24]
        if name not in self.done:
            self.done[name] = measure()
            write_atomically(self.path, json.dumps(self.done).encode())
        return self.done[name]


def digest(tensor: Tensor) -> str:
    """Of a tensor's content, for a cell's key."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()[:16]


def digest_of_model(model: nn.Module) -> str:
    """Of some figures of every weight: another training changes them, and a large model is not read whole."""
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].float().cpu()
        found.update(f"{name} {tuple(weight.shape)} {digest(some)}".encode())
    return found.hexdigest()[:16]


def digests(gates: GateBank | None) -> dict[str, str]:
    """Of all weights of some gates."""
    return {} if gates is None else {name: digest(weight) for name, weight in sorted(gates.state_dict().items())}
