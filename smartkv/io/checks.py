"""Checks of data from outside: tensors for NaN and infinity, JSON values for their type and range; values in words.

The checks of JSON values raise a ValueError that names the value, what was expected and what came.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

LARGEST = 2**53  # JSON readers that use doubles hold whole numbers exactly up to here
Flat = TypeVar("Flat")


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor that is not empty holds neither NaN nor infinity.

    The minimum and the maximum tell it in one pass that writes nothing. `isfinite` of each element takes fifteen times
    as long.
    """
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # a NaN makes both of them NaN


def describe(value: Any) -> str:
    """Return what an error message calls a value: short ones as Python writes them, others by their class."""
    if value is None or isinstance(value, bool | Real | str):
        return repr(value)
    return f"'{value}'" if isinstance(value, Path) else f"a {type(value).__name__}"


def check_whole(name: str, value: Any, least: int = 0) -> int:
    """Return `value` if it is a whole number of at least `least`.

    Args:
        name: Name of the value in the message.
        value: The value.
        least: The smallest number that is allowed.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < LARGEST:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def check_number(name: str, value: Any) -> float:
    """Return `value` if it is a finite number.

    Args:
        name: Name of the value in the message.
        value: The value.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


def check_type(name: str, value: Any, expected: type) -> Any:
    """Return `value` if it is an instance of `expected`: a str, a list or a dict.

    Args:
        name: Name of the value in the message.
        value: The value.
        expected: The class.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, expected):
        raise ValueError(f"{name} must be a {expected.__name__}, got {value!r}")
    return value


def read_dataclass(cls: type[Flat], content: Any, least: int = 0) -> Flat:
    """Build a dataclass from a JSON object.

    Args:
        cls: A dataclass whose fields are all str or int.
        content: The JSON value.
        least: The smallest value of an int field.

    Raises:
        ValueError: `content` is no object, has other fields than the class, or a value of the wrong type or range.
    """
    content = check_type(cls.__name__, content, dict)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if different := sorted({*names} ^ {*content}):
        raise ValueError(
            f"{cls.__name__} must have the fields {', '.join(names)}, and differs in {', '.join(map(str, different))}"
        )
    for field in fields(cls):  # type: ignore[arg-type]
        value = content[field.name]
        if field.type in (int, "int"):
            check_whole(field.name, value, least)
        else:
            check_type(field.name, value, str)
    return cls(**content)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings that two JSON objects both have with different values, such as `objective.loss huber, now mse`.

    A class in a config, `{"class_path": …, "init_args": …}`, is compared by its name and then argument by argument. A
    setting that only one of them has is left out: another version of SmartKV may know it.

    Args:
        then: The earlier settings.
        now: The present settings.
    """
    earlier = dict(_flat(then))
    return [f"{k} {earlier[k]}, now {v}" for k, v in _flat(now) if k in earlier and earlier[k] != v]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and "class_path" in value:
            yield prefix + name, value["class_path"]
            yield from _flat(value.get("init_args") or {}, f"{prefix}{name}.")
        else:
            yield prefix + name, value
