"""A table that sets the gates of several comparisons beside each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.common.results import read_result
from eval.eviction.frontier import REFERENCE
from smartkv.errors import SmartKVError


@dataclass(frozen=True)
class Line:
    """One contender at one footprint.

    Attributes:
        label: name for a reader.
        footprint: share of a full cache's keys that the scored queries saw, mean over windows.
        stored: bytes held at the end of a text over those of a full cache in float16; None: nothing is freed.
        delta_nll: mean NLL above the full cache's, nats a token.
        recalled, asked: facts answered right, and facts that the full cache answers right.
    """

    label: str
    footprint: float
    stored: float | None
    delta_nll: float
    recalled: int
    asked: int


def read_lines(folder: Path, label: str, reference: bool) -> tuple[list[Line], dict[str, Any]]:
    """Read what `eval compare` left in a folder.

    Args:
        folder: holds compare.json.
        label: what its gates are called.
        reference: also return the sliding window's lines.

    Returns:
        The lines, the gates' first, and the arguments of the comparison.

    Raises:
        SmartKVError: the file is missing, or is not what `eval compare` writes.
    """
    content = read_result(folder / "compare.json")
    lines = []
    try:
        for row in sorted(content["rows"], key=lambda row: row["kind"] != "ours"):
            if row["kind"] != "ours" and not (reference and row["contender"] == REFERENCE):
                continue
            name = label if row["kind"] == "ours" else "StreamingLLM window"
            recall = row["recall"] or {"asked": 0, "right": None}
            recalled = round((recall["right"] or 0) * recall["asked"])
            for text in row["texts"].values():
                figures = (text["footprint"], text["stored"], text["delta_nll"])
                lines.append(Line(name, *figures, recalled, recall["asked"]))
    except (KeyError, TypeError) as error:
        raise SmartKVError(f"{folder / 'compare.json'} is not what `eval compare` writes ({error})") from error
    return lines, content["arguments"]


def side_by_side_table(folders: dict[str, Path]) -> Table:
    """The gates of each folder and, from the first of them, the full cache and the sliding window.

    Args:
        folders: label of the gates -> folder with a compare.json; measured on the same texts and facts.

    Raises:
        SmartKVError: a file that cannot be read, or comparisons of other texts or facts.
    """
    lines: list[Line] = []
    window: list[Line] = []
    arguments: list[dict[str, Any]] = []
    for label, folder in folders.items():
        found, settings = read_lines(folder, label, reference=not arguments)
        window += [line for line in found if line.label != label]
        lines += [line for line in found if line.label == label]
        arguments.append(
            {name: settings[name] for name in ("backbone", "window", "score_from", "seed", "texts", "recall")}
        )
    if any(other != arguments[0] for other in arguments[1:]):
        raise SmartKVError(f"{', '.join(map(str, folders.values()))} were measured on other texts: they have no table")
    same = arguments[0]
    windows = sum(text["windows"] for text in same["texts"].values())
    table = Table(
        title=f"{same['backbone']}: {windows} windows of {same['window']:,} tokens that no gate was trained on",
        caption="Lost: NLL above the full cache's, nats a token. Facts: stated once, asked for at the end of the text; "
        "counted are those that the full cache recalls.",
    )
    for column in ("", "keys kept", "bytes held", "lost", "facts recalled"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    asked = max((line.asked for line in [*lines, *window]), default=0)
    for line in [Line("full cache", 1.0, 1.0, 0.0, asked, asked), *lines, *window]:
        table.add_row(
            line.label,
            f"{line.footprint:.0%}",
            "–" if line.stored is None else f"{line.stored:.0%}",
            f"{line.delta_nll:+.3f}",
            f"{line.recalled} of {line.asked}" if line.asked else "–",
        )
    return table
