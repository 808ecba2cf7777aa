"""What the processes of a run ask: which one this is, what all have summed or found wrong, whether a checkpoint is of
this run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor, distributed

from smartkv.errors import SmartKVError

AT_ONCE = 2**24  # numbers of a sum that a device holds while processes exchange them


def process_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Number of this process, and how many there are; without a trainer it is alone."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def sum_over_processes(trainer: L.Trainer, totals: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place, on whichever device it is. All call it, with the same shapes."""
    if trainer.world_size == 1:
        return
    for total in totals:
        for part in total.view(-1).split(AT_ONCE):
            part.copy_(trainer.strategy.reduce(part.to(trainer.strategy.root_device), reduce_op="sum"))


@contextmanager
def failing_together() -> Iterator[None]:
    """What processes do in parts: where one of them finds a mistake, all of them stop with what it says. Alone it would
    leave the others waiting for it, until they are killed with nothing said. All processes must come here."""
    mistake = None
    try:
        yield
    except SmartKVError as error:
        mistake = error
    if distributed.is_available() and distributed.is_initialized():
        said: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(said, None if mistake is None else str(mistake))
        others = [text for text in said if text is not None]
        if mistake is None and others:
            mistake = SmartKVError(others[0])
    if mistake is not None:
        raise mistake


def check_resumed(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises SmartKVError where a checkpoint's data (`then`) are not this run's: other rows would follow."""
    if then != now:
        raise SmartKVError(f"the checkpoint was made with {then}, this run has {now}: the same rows cannot follow")
