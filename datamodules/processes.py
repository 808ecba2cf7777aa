"""What the processes of a run ask: which one this is, what all have summed, whether a checkpoint is of this run."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from torch import Tensor

from smartkv.errors import SmartKVError

AT_ONCE = 2**24  # numbers of a sum that a device holds while processes exchange them


def process_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Number of this process, and how many there are; without a trainer it is alone."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def add_up(trainer: L.Trainer, totals: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place, on whichever device it is. All call it, with the same shapes."""
    if trainer.world_size == 1:
        return
    for total in totals:
        for part in total.view(-1).split(AT_ONCE):
            part.copy_(trainer.strategy.reduce(part.to(trainer.strategy.root_device), reduce_op="sum"))


def check_resumed(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises SmartKVError where a checkpoint's data (`then`) are not this run's: other rows would follow."""
    if then != now:
        raise SmartKVError(f"the checkpoint was made with {then}, this run has {now}: the same rows cannot follow")
