"""`python -m eval side_by_side`: the gates of several comparisons in one table."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.common.console import make_console
from eval.common.results import read_result, write_result
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


def side_by_side(out: str, results: dict[str, str]) -> None:
    """Set the gates of several comparisons beside a full cache and a sliding window.

    Args:
        out: folder for side_by_side.json.
        results: label of the gates -> folder of `eval compare`. All must have read the same texts and asked for the
            same facts. The sliding window is that of the first.
    """
    lines, arguments = collect({label: Path(folder) for label, folder in results.items()})
    console = make_console()
    console.print(side_by_side_table(lines, arguments))
    figures = {"units": UNITS, "lines": [asdict(line) for line in lines]}
    result = write_result(Path(out), "side_by_side", arguments | {"results": results}, figures)
    console.print(f"  {result}", highlight=False)


UNITS = {
    "footprint": "keys seen ÷ keys of a full cache, over the queries whose next token is scored",
    "stored": "bytes held when the text was read ÷ those of its keys and values in float16; null: simulated by a mask",
    "delta_nll": "nats a token above the full cache",
    "asked": "facts that the full cache recalls",
}


def collect(folders: dict[str, Path]) -> tuple[list[Line], dict[str, Any]]:
    """Read the lines of several comparisons.

    Args:
        folders: label of the gates -> folder with a compare.json.

    Returns:
        The full cache, the gates of each folder, and the sliding window of the first; and the arguments that all share.

    Raises:
        SmartKVError: nothing to read, a file that cannot be read, or comparisons of other texts or facts.
    """
    if not folders:
        raise SmartKVError(
            'expected at least one result of `eval compare`, got none: --results \'{"gates": "runs/x"}\''
        )
    gates: list[Line] = []
    window: list[Line] = []
    arguments: list[dict[str, Any]] = []
    for label, folder in folders.items():
        lines, settings = read_lines(folder, label, reference=not arguments)
        gates += [line for line in lines if line.label == label]
        window += [line for line in lines if line.label != label]
        arguments.append({name: settings[name] for name in SHARED})
    if any(other != arguments[0] for other in arguments[1:]):
        raise SmartKVError(f"{', '.join(map(str, folders.values()))} were measured on other texts: they have no table")
    asked = max((line.asked for line in [*gates, *window]), default=0)
    return [Line("full cache", 1.0, 1.0, 0.0, asked, asked), *gates, *window], arguments[0]


SHARED = ("backbone", "window", "score_from", "seed", "texts", "recall")  # arguments that must be the same


def side_by_side_table(lines: list[Line], arguments: dict[str, Any]) -> Table:
    """One row a line; `arguments` as `collect` returns them."""
    windows = sum(text["windows"] for text in arguments["texts"].values())
    table = Table(
        title=f"{arguments['backbone']}: {windows} unseen windows of {arguments['window']:,} tokens",
        caption="Lost: NLL above the full cache's, nats a token. Facts: stated once, asked for at the end of the text; "
        "counted are those that the full cache recalls.",
    )
    for column in ("", "keys kept", "bytes held", "lost", "facts recalled"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines:
        table.add_row(
            line.label,
            f"{line.footprint:.0%}",
            "–" if line.stored is None else f"{line.stored:.0%}",
            f"{line.delta_nll:+.3f}",
            f"{line.recalled} of {line.asked}" if line.asked else "–",
        )
    return table
