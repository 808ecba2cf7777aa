"""Table, Markdown page and picture of `python -m eval decode`."""

from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from eval.common.contender_styles import contender_styles
from eval.common.figures import PANEL, legend_beside, new_figure, styled

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
    """Return the table's cells, one row a measurement, in the order of `COLUMNS`."""
    cells = []
    for f in figures:
        ms, prefill = f["ms_per_token"], f["prefill"]
        faster = [f"{ms[way] / ms['smartkv']:.2f}" for way in ("dynamic", "static", "smartkv_full")]
        cells.append(
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
    return cells


def decode_table(figures: list[dict[str, Any]]) -> Table:
    """Return the table for the console."""
    table = Table(title="Decode and prefill; × = times as fast as")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows(figures):
        table.add_row(*row)
    return table


def markdown(arguments: dict[str, Any], figures: list[dict[str, Any]]) -> str:
    """Return the table as a Markdown page, with the machine and the milliseconds of every way."""
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


@styled
def decode_picture(figures: list[dict[str, Any]]) -> Figure:
    """Draw milliseconds a step over the tokens in the cache, one panel a batch size.

    Args:
        figures: of each measurement `context`, `batch` and `ms_per_token` (way -> milliseconds).
    """
    batches = sorted({measured["batch"] for measured in figures})
    figure = new_figure((PANEL[0] * len(batches) + 1.8, PANEL[1]))
    all_axes = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(all_axes, batches, strict=True):
        rows = sorted((measured for measured in figures if measured["batch"] == batch), key=lambda row: row["context"])
        contexts = [row["context"] for row in rows]
        for way, style in contender_styles(NAMES).items():
            axes.plot(contexts, [row["ms_per_token"][way] for row in rows], **style.plot())
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_title("one sequence" if batch == 1 else f"{batch} sequences")
    all_axes[0].set_ylabel("decode step, ms")
    legend_beside(figure, all_axes[0])
    return figure
