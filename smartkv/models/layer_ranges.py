"""Ranges of layers as text, such as `0-2,20-29` or `early,late`, for configs and messages."""

import re
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.io.checks import describe

NAMES = ("early", "middle", "late")
_RANGE = re.compile(r"[0-9]+(\s*-\s*[0-9]+)?")


def depth_ranges(total: int) -> dict[str, range]:
    """Return the `early`, `middle` and `late` layers of a model, which together are all of its layers.

    Of 24 to 28 layers they are 0-2, 3-19 and those from 20 on; other depths are divided in proportion. A range of a
    model with few layers may be empty.

    Args:
        total: Number of layers of the model.
    """
    reference = min(max(total, 24), 28)
    first, last = round(3 * total / reference), round(20 * total / reference)
    return {"early": range(first), "middle": range(first, last), "late": range(last, total)}


def parse_layers(layers: str | None, total: int) -> list[int]:
    """Parse ranges of layers.

    Args:
        layers: Ranges in any order, both ends included: `"0-2,20-29"`. Parts may be names of `depth_ranges`, such as
            `"early,late"`. None or `"all"` for every layer.
        total: Number of layers of the model.

    Returns:
        The layers' indices, ascending.

    Raises:
        SmartKVError: The text is not a list of ranges, or the model lacks one of the layers.
    """
    if layers is None or layers == "all":
        return list(range(total))
    chosen: set[int] = set()
    by_depth = depth_ranges(total)
    for part in check_ranges(str(layers)):
        if part in by_depth:
            chosen.update(by_depth[part])
            continue
        first, last = _ends(part)
        if last >= total:
            raise SmartKVError(f"layers '{layers}' asks for {part}, but the model has layers 0-{total - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def check_ranges(layers: Any) -> list[str]:
    """Return the parts of ranges of layers, as in `parse_layers`, for a model of any depth.

    Raises:
        SmartKVError: The text is not a list of ranges.
    """
    example = "write for example '0-2,20-23', 'early,late' or 'all'"
    if not isinstance(layers, str):
        raise SmartKVError(f"layers must be ranges as text, got {describe(layers)}: {example}")
    parts = [part.strip() for part in layers.split(",")]
    for part in parts:
        if part in NAMES or part == "all" == layers:
            continue
        if not _RANGE.fullmatch(part):
            raise SmartKVError(f"layers '{layers}' is no list of ranges: {example}")
        first, last = _ends(part)
        if first > last:
            raise SmartKVError(f"layers '{layers}' has its ends the wrong way round: write '{last}-{first}'")
    return parts


def _ends(part: str) -> tuple[int, int]:
    first, _, last = part.partition("-")
    return int(first), int(last or first)


def format_layers(layers: list[int]) -> str:
    """Format ascending layer indices as ranges, the inverse of `parse_layers`: `[0, 1, 2, 5]` gives `"0-2,5"`."""
    ranges: list[list[int]] = []  # [first, last], both included
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
