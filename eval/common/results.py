"""What every command leaves behind."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.table import Table

from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically


def versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "lightning": version("lightning"),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure was measured on."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    found = {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    found |= {"capability": torch.backends.cpu.get_cpu_capability()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | versions()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def write_result(out: Path, command: str, arguments: dict[str, Any], figures: dict[str, Any]) -> Path:
    """`<out>/<command>.json`: arguments, versions and figures."""
    path = out / f"{command}.json"
    content = {"command": command, "arguments": arguments, "versions": versions(), **figures}
    write_atomically(path, json.dumps(content, indent=1, default=str).encode())
    return path


def read_result(path: Path) -> dict[str, Any]:
    """
    Raises:
        SmartKVError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SmartKVError(f"{path} cannot be read ({type(error).__name__}): run the command that makes it") from error


def save_picture(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def write_tables(path: Path, tables: Sequence[Table], introduction: str = "") -> Path:
    """What the console shows, as Markdown, for documents: a heading and a table each, after an introduction."""
    parts = [f"{introduction}\n"] if introduction else []
    write_atomically(path, "\n".join([*parts, *(markdown(table) for table in tables)]).encode())
    return path


def provenance(command: str, arguments: dict[str, Any]) -> str:
    """A line for a page of tables: the command, its arguments, the machine among them."""
    said = ", ".join(f"{name} {value}" for name, value in arguments.items() if name != "machine")
    where = ", ".join(f"{name} {value}" for name, value in arguments["machine"].items())
    return f"`python -m eval {command}`: {said}. Machine: {where}."


def markdown(table: Table) -> str:
    """A table of plain text cells."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = zip(*columns, strict=True)
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)]
    return "\n".join([f"### {table.title}", "", *lines, ""])
