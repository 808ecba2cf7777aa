"""Fills the values of a run into a template of configs/recipe, whose comments stay."""

import json
from collections.abc import Mapping
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from smartkv.errors import SmartKVError

WIDTH = 120  # characters of a line, beyond which a list takes one line an item


def fill(template: str, values: Mapping[str, Any], header: str) -> str:
    """Return a template with other values and another header.

    Args:
        template: YAML with comments.
        values: by dotted key, such as `model.init_args.dtype`; a callback is named by its class, such as
            `trainer.callbacks.GateExport.init_args.dtype`. Every key must be in the template.
        header: lines that take the place of the comments before the first blank line, without `#`.

    Raises:
        SmartKVError: the template lacks a key.
    """
    root: Node = yaml.compose(template)  # type: ignore[assignment]  # a template is not empty
    places = sorted(((_find(root, key), value) for key, value in values.items()), key=lambda each: -each[0][0])
    for (start, end, column), value in places:
        template = _replaced(template, start, end, column, value)
    _, _, body = template.partition("\n\n")
    return "\n".join(f"# {line}".rstrip() for line in header.splitlines()) + "\n\n" + body


def _find(root: Node, key: str) -> tuple[int, int, int]:
    """Return where a value begins and ends in the text, and the column of its key."""
    node, column = root, 0
    for name in key.split("."):
        below, column = _below(node, name), node.start_mark.column
        if below is None:
            raise SmartKVError(f"the template has no key {key}")
        node = below
    return node.start_mark.index, _end(node), column


def _below(node: Node, name: str) -> Node | None:
    if isinstance(node, MappingNode):
        return next((value for key, value in node.value if key.value == name), None)
    if isinstance(node, SequenceNode):
        return next((item for item in node.value if _class_of(item) == name), None)
    return None


def _class_of(item: Node) -> str | None:
    node = _below(item, "class_path") if isinstance(item, MappingNode) else None
    return str(node.value) if isinstance(node, ScalarNode) else None


def _end(node: Node) -> int:
    """Return where a value ends: a block ends with its last scalar, and not where the next key begins."""
    if isinstance(node, MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    if isinstance(node, SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _replaced(text: str, start: int, end: int, column: int, value: Any) -> str:
    line_start = text.rindex("\n", 0, start) + 1
    rest, newline, after = text[end:].partition("\n")
    written = _flow(value)
    is_block = text[line_start:start].strip() in ("", "-") and text[start] == "-"
    if isinstance(value, list) and (is_block or start - line_start + len(written) + len(rest) > WIDTH):
        indent = " " * (column + 2)
        items = "".join(f"\n{indent}- {_flow(item)}" for item in value)
        if is_block:
            return f"{text[: line_start - 1]}{items}{rest}{newline}{after}"
        return f"{text[:start].rstrip()}{rest}{items}{newline}{after}"
    comment = rest.lstrip(" ")
    if comment.startswith("#"):  # at its old place, if there is room
        rest = " " * max(2, end + len(rest) - len(comment) - start - len(written)) + comment
    return f"{text[:start]}{written}{rest}{newline}{after}"


def _flow(value: Any) -> str:
    """Write a value in one line, as YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        plain = not set(value) & set(",[]{}#&*!|>'\"%@`:\\\n") and value == value.strip() and value
        return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
