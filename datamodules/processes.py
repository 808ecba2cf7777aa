"""What all datamodules share: which process this is, and whether a checkpoint is of this run."""

from typing import Any

import lightning as L

from smartkv.errors import SmartKVError


def process_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Number of this process, and how many there are; without a trainer it is alone."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def check_resumed(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises SmartKVError where a checkpoint's data (`then`) are not this run's: other rows would follow."""
    if then != now:
        raise SmartKVError(f"the checkpoint was made with {then}, this run has {now}: the same rows cannot follow")
