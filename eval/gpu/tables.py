"""The results of a GPU check as Markdown tables."""

from typing import Any

WHERE = ("shape", "context", "batch")
UNITS = {
    "microseconds": ("µs", "{:,.0f}"),
    "gb_per_s": ("GB/s of what it reads", "{:,.0f}"),
    "error": ("relative error", "{:.1e}"),
    "eager_ms": ("ms a step", "{:.2f}"),
    "captured_ms": ("ms a step, captured", "{:.2f}"),
    "bytes": ("GB of keys and values", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "together": ("s, all 48 gates together", "{:.2f}"),
    "apart": ("s, one after another", "{:.2f}"),
    "ratio": ("× as fast together", "{:.1f}"),
    "held": ("keys held a head", "{:,.0f}"),
    "storage_bytes": ("GB of the cache", "{:.3f}"),
    "allocated_bytes": ("GB allocated", "{:.3f}"),
    "reserved_bytes": ("GB reserved", "{:.3f}"),
    "peak_bytes": ("GB at most", "{:.3f}"),
    "passed": ("passed", "{}"),
    "failed": ("failed", "{}"),
    "note": ("", "{}"),
}
TITLES = {
    "one_layer": "Attention of one layer, one token a row",
    "steps": "Decode steps of the whole model",
    "prefill": "Prompts",
    "harvest": "Labels of one window",
    "memory": "Memory of a long answer under a budget",
    "fit": "Training of 48 gates",
    "tests": "Tests that need a GPU",
}


def page(machine: dict[str, Any], arguments: dict[str, Any], parts: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown page with a table of each part.

    Args:
        machine: words for the first lines.
        arguments: of the run.
        parts: rows of each part.
    """
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    how = ", ".join(f"{key} {value}" for key, value in arguments.items())
    lines = [
        "# SmartKV on a GPU",
        "",
        f"Written by `scripts/gpu_check.sh`: {how}. Weights are random; time and memory do not depend on them.",
        f"Machine: {told}.",
        "*SmartKV* holds a share of the keys, unlike many a head.",
        "*static* and *dynamic* are transformers' caches of all keys.",
    ]
    for part, rows in parts.items():
        if rows:
            lines += ["", f"## {TITLES[part]}", "", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table, with a column for each figure that some row has."""
    where = [name for name in (*WHERE, "way") if any(name in row for row in rows)]
    figures = [name for name in UNITS if any(name in row for row in rows)]
    head = [*where, *(UNITS[name][0] for name in figures)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(where) + "---:|" * len(figures)]
    for row in rows:
        places = [row.get(name, "") for name in where]
        cells = [f"{place:,}" if isinstance(place, int) else place for place in places]
        lines.append("| " + " | ".join(cells + [_cell(name, row.get(name)) for name in figures]) + " |")
    return lines


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    unit, form = UNITS[name]
    return form.format(value / 1e9 if unit.startswith("GB ") else value).replace("|", "/")
