"""Communication of a run's processes: rank, sums, shared errors, and the check of a resumed run's data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor, distributed

from smartkv.errors import SmartKVError
from smartkv.io.checks import differences

CHUNK = 2**24  # numbers summed in one exchange, which bounds the memory on the device


def process_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return rank and world size; (0, 1) without a trainer."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def sum_over_processes(trainer: L.Trainer, totals: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place.

    All processes must call it with tensors of the same shapes, in the same order.

    Args:
        trainer: the running trainer.
        totals: contiguous tensors on any device.
    """
    if trainer.world_size == 1:
        return
    for total in totals:
        for part in total.view(-1).split(CHUNK):
            part.copy_(trainer.strategy.reduce(part.to(trainer.strategy.root_device), reduce_op="sum"))


@contextmanager
def failing_together() -> Iterator[None]:
    """Context for work divided among processes: a SmartKVError in one of them is raised in all.

    Without it, the other processes would wait for the one that failed until they are killed without a message. All
    processes must enter the context.

    Raises:
        SmartKVError: this process's own error, else the first of another process.
    """
    failure = None
    try:
        yield
    except SmartKVError as error:
        failure = error
    if distributed.is_available() and distributed.is_initialized():
        messages: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(messages, None if failure is None else str(failure))
        first = next((message for message in messages if message is not None), None)
        if failure is None and first is not None:
            failure = SmartKVError(first)
    if failure is not None:
        raise failure


def check_resumed(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a checkpoint continues on the data of this run.

    Args:
        then: the datamodule's state in the checkpoint.
        now: its state in this run.

    Raises:
        SmartKVError: they differ, so the run would continue with other rows.
    """
    if then != now:
        changed = "; ".join(differences(then, now)) or f"{then}, now {now}"
        raise SmartKVError(
            f"the checkpoint was made on other data ({changed}): the same rows cannot follow. Give the data of the "
            "checkpoint, or start a run of its own"
        )
