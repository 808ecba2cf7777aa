"""What `python -m eval decode` shows: a table, the same as markdown, a picture."""

from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from eval.common.figures import COLOURS

NAMES = {
    "smartkv": "SmartKV",
    "dynamic": "DynamicCache",
    "static": "StaticCache",
    "smartkv_full": "our slots, nothing evicted",
}
INTRODUCTION = """# Benchmarks of the cache

Written by `make bench` (`python -m eval decode --config configs/eval/decode.yaml`). × says how many times as fast
SmartKV is. *limit by bytes*: weights and full cache ÷ weights and our cache, what could be won if nothing but memory
traffic counted. *own full*: the same slots and kernels with nothing evicted. *bytes*: all tensors of the cache as
allocated, ÷ the full cache's keys and values, ÷ those of the live keys alone. *gates*: their share of a forward pass.
*peak ÷ now*: the fullest moment of prefill and decode ÷ what is stored at the end."""
COLUMNS = (
    "context",
    "batch",
    "ms/token",
    "× Dynamic",
    "× Static",
    "× own full",
    "limit by bytes",
    "prefill tokens/s",
    "× Dynamic",
    "gates, decode",
    "gates, prefill",
    "bytes ÷ full",
    "bytes ÷ live",
    "peak ÷ now",
)


def rows(figures: list[dict[str, Any]]) -> list[list[str]]:
    """A line a figure, in the order of `COLUMNS`; × is how many times as fast SmartKV is."""
    found = []
    for f in figures:
        ms, prefill = f["ms_per_token"], f["prefill"]
        faster = [f"{ms[way] / ms['smartkv']:.2f}" for way in ("dynamic", "static", "smartkv_full")]
        found.append(
            [
                f"{f['context']:,}",
                str(f["batch"]),
                f"{ms['smartkv']:.1f}",
                *faster,
                f"{f['limit_by_bytes']:.2f}",
                f"{prefill['smartkv']:.0f}",
                f"{prefill['smartkv'] / prefill['dynamic']:.2f}",
                f"{f['gates_share_of_decode']:.1%}",
                f"{f['gates_share_of_prefill']:.1%}",
                f"{f['share_of_full']:.3f}",
                f"{f['bytes'] / f['live_bytes']:.3f}",
                f"{f['peak_bytes'] / f['bytes']:.2f}",
            ]
        )
    return found


def decode_table(figures: list[dict[str, Any]]) -> Table:
    """For the console."""
    table = Table(title="Decode and prefill; × = times as fast as")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows(figures):
        table.add_row(*row)
    return table


def markdown(arguments: dict[str, Any], figures: list[dict[str, Any]]) -> str:
    """The same as a page, with the machine and all milliseconds."""
    machine = ", ".join(f"{key} {value}" for key, value in arguments["machine"].items())
    lines = [
        *INTRODUCTION.splitlines(),
        "",
        f"{arguments['backbone']}, {arguments['dtype']}, policy {arguments['policy']} at footprint "
        f"{arguments['footprint']}, gates {arguments['gates']}; median of {arguments['rounds']} rounds of "
        f"{arguments['steps']} tokens, all ways in one run. Machine: {machine}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---:|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(figures)),
        "",
        "Milliseconds a token:",
        "",
        "| context | batch | " + " | ".join(NAMES.values()) + " |",
        "|" + "---:|" * (2 + len(NAMES)),
    ]
    for f in figures:
        cells = " | ".join(f"{f['ms_per_token'][way]:.1f}" for way in NAMES)
        lines.append(f"| {f['context']:,} | {f['batch']} | {cells} |")
    return "\n".join(lines) + "\n"


def picture(figures: list[dict[str, Any]]) -> Figure:
    """ms a token over the context, a panel a batch."""
    batches = sorted({f["batch"] for f in figures})
    figure = Figure(figsize=(4.5 * len(batches), 3.8), layout="constrained")
    for place, batch in enumerate(batches, 1):
        axes = figure.add_subplot(1, len(batches), place)
        own = [f for f in figures if f["batch"] == batch]
        for number, (way, name) in enumerate(NAMES.items()):
            points = [f["ms_per_token"][way] for f in own]
            axes.plot([f["context"] for f in own], points, "osD^"[number] + "-", color=COLOURS[number], label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks([f["context"] for f in own], [f"{f['context']:,}" for f in own])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("ms a step")
        axes.set_title(f"batch {batch}")
        axes.grid(alpha=0.3)
        if place == 1:
            axes.legend(fontsize=8)
    return figure
