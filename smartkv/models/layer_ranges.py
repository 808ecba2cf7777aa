"""Layers as text: "0-2,20-29"."""

import re

from smartkv.errors import SmartKVError


def parse_layers(layers: str | None, total: int) -> list[int]:
    """`"0-2,20-29"` -> indices; None or `"all"`: every layer.

    Raises:
        SmartKVError: not a range, or one that the model does not have.
    """
    if layers is None or layers == "all":
        return list(range(total))
    chosen: set[int] = set()
    for part in str(layers).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise SmartKVError(f"layers '{layers}' is no list of ranges: write for example '0-2,20-{total - 1}'")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= total:
            raise SmartKVError(f"layers '{layers}' asks for {part.strip()}, but the model has layers 0-{total - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def format_layers(layers: list[int]) -> str:
    """The inverse of `parse_layers`: `[0, 1, 2, 5]` -> `"0-2,5"`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
