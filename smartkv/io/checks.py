"""Checks of what may be wrong: a tensor's NaN and infinity, and what stands in a JSON file, of which a ValueError names
what is not what it should be."""

import math
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

LARGEST = 2**53  # as far as JSON's numbers are whole
Flat = TypeVar("Flat")


def all_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity, in a tensor that is not empty.

    One pass that writes nothing: `isfinite` of each number takes fifteen times as long.
    """
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is both


def check_whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < LARGEST:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def check_number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


def check_type(name: str, value: Any, expected: type) -> Any:
    """A text, a list or a mapping."""
    if not isinstance(value, expected):
        raise ValueError(f"{name} must be a {expected.__name__}, got {value!r}")
    return value


def read_dataclass(cls: type[Flat], content: Any, least: int = 0) -> Flat:
    """A dataclass whose fields are texts and whole numbers of at least `least`."""
    content = check_type(cls.__name__, content, dict)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if missing := sorted({*names} ^ {*content}):
        raise ValueError(f"{cls.__name__} has {', '.join(names)}, and differs in {', '.join(map(str, missing))}")
    for field in fields(cls):  # type: ignore[arg-type]
        value = content[field.name]
        if field.type in (int, "int"):
            check_whole(field.name, value, least)
        else:
            check_type(field.name, value, str)
    return cls(**content)
