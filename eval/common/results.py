"""Files that commands write: JSON results, Markdown tables, pictures."""

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
    """Return the versions of the libraries that figures depend on."""
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "lightning": version("lightning"),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine that figures are measured on.

    Args:
        device: cpu or cuda; a GPU is named too.
    """
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    description: dict[str, Any] = {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    description |= {"capability": torch.backends.cpu.get_cpu_capability()}
    if torch.device(device).type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
    return description | versions()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def write_result(out: Path, command: str, arguments: dict[str, Any], figures: dict[str, Any]) -> Path:
    """Write `<out>/<command>.json`: arguments, versions and figures.

    Args:
        out: folder.
        command: its name.
        arguments: of the run.
        figures: further keys of the file.

    Returns:
        The file's path.
    """
    path = out / f"{command}.json"
    content = {"command": command, "arguments": arguments, "versions": versions(), **figures}
    write_atomically(path, json.dumps(content, indent=1, default=str).encode())
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Read a result that a command wrote.

    Raises:
        SmartKVError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SmartKVError(f"{path} cannot be read ({type(error).__name__}): run the command that makes it") from error


def save_picture(figure: Figure, path: Path) -> Path:
    """Save a figure as PNG, 130 dots per inch; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def write_tables(path: Path, tables: Sequence[Table], introduction: str = "") -> Path:
    """Write tables as Markdown, each with a heading.

    Args:
        path: of the file.
        tables: of plain text cells.
        introduction: text before the tables.
    """
    parts = [f"{introduction}\n"] if introduction else []
    write_atomically(path, "\n".join([*parts, *(markdown(table) for table in tables)]).encode())
    return path


def provenance(command: str, arguments: dict[str, Any]) -> str:
    """Return a line of Markdown that tells the command, its arguments and the machine.

    Args:
        command: its name.
        arguments: of the run, `machine` among them.
    """
    settings = ", ".join(f"{name} {value}" for name, value in arguments.items() if name != "machine")
    machine_parts = ", ".join(f"{name} {value}" for name, value in arguments["machine"].items())
    return f"`python -m eval {command}`: {settings}. Machine: {machine_parts}."


def markdown(table: Table) -> str:
    """Return a table of plain text cells as Markdown, its title as a heading."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = zip(*columns, strict=True)
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)]
    return "\n".join([f"### {table.title}", "", *lines, ""])
