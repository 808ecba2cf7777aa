"""Caches under autocast: what they get has one dtype, and what they do with it follows its dtype alone.

Under `torch.autocast` a model of float32 weights hands keys and values of unlike dtypes to its attention, which casts
them. Inside a cache autocast would cast again what is stored, and it refuses some integers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Context manager in which autocast is off on a device."""
    if not _enabled(device.type):  # the usual case, in every layer of every token
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype to which autocast takes attention, where it is on; else as they are."""
    kind = tensors[0].device.type
    if not _enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _enabled(kind: str) -> bool:
    """Return whether autocast is on for a type of device; some, such as that of weights on a disk, have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
