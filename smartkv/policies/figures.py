"""Checks of what rules and policies are made of, the same for Python and for YAML."""

import math
import re
from dataclasses import MISSING, fields
from numbers import Real
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.io.checks import describe

_FIGURES = ("price", "multiple", "window_share")  # which may be fractions
_YAML_TEXT = re.compile(r"[+-]?(\d[\d_]*(\.\d*)?e[+-]?\d+|inf)", re.IGNORECASE)  # `1e-3`, `inf`: text to YAML


def is_number(value: Any) -> bool:
    """Return whether a value is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_figure(name: str, value: Any) -> None:
    """Check that a figure of a policy is a number.

    Args:
        name: of the figure, in the message.
        value: the figure.

    Raises:
        SmartKVError: it is none, or NaN.
    """
    if is_number(value) and not math.isnan(value):
        return
    advice = ""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+|inf)", value.strip()):
        advice = ": write it without quotes"
    elif hasattr(value, "item"):
        advice = ": write float(…)"
    raise SmartKVError(f"{name} must be a number, got {describe(value)}{advice}")


def check_tokens(name: str, value: Any, least: int, unit: str = "tokens") -> None:
    """Check that a figure of a policy is a whole number.

    Args:
        name: of the figure, in the message.
        value: the figure.
        least: the smallest number that is allowed.
        unit: what is counted.

    Raises:
        SmartKVError: it is another number, or none.
    """
    if type(value) is not int or value < least:
        smallest = f"at least {least}" if least else "0 or more"
        raise SmartKVError(f"{name} must be a number of {unit}, {smallest}, got {describe(value)}")


def read_fields(cls: type, content: Any, what: str) -> dict[str, Any]:
    """Return the fields of a dataclass in a mapping from YAML or JSON.

    Args:
        cls: the dataclass.
        content: the mapping.
        what: it describes, in the message.

    Returns:
        The mapping, in which the texts that YAML does not take for numbers, `1e-3` and `inf`, are numbers.

    Raises:
        SmartKVError: it is none, or a key is unknown or missing.
    """
    if not isinstance(content, dict):
        raise SmartKVError(f"{what} is a mapping, got {describe(content)}")
    names = [field.name for field in fields(cls)]
    if unknown := sorted(set(map(str, content)) - set(names)):
        raise SmartKVError(f"{what} has no {', '.join(unknown)}: expected {', '.join(sorted(names))}")
    needed = [field.name for field in fields(cls) if field.default is MISSING]
    if missing := [name for name in needed if name not in content]:
        raise SmartKVError(f"{what} needs {' and '.join(missing)}, got {', '.join(content) or 'an empty mapping'}")
    return {name: _number(value) if name in _FIGURES else value for name, value in content.items()}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _YAML_TEXT.fullmatch(value) else value
