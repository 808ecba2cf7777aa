"""`python -m eval training`: speed and memory of gate training, all gates together and one by one.

The keys are random, since speed and memory do not depend on their values.
"""

import math
import tempfile
from pathlib import Path

import torch
from rich.progress import Progress

from eval.common.console import make_console
from eval.common.isolated import run_isolated
from eval.common.results import machine, provenance, save_picture, write_result, write_tables
from eval.speed.gate_fits import SINKS, SIZES, both_ways, growth_of_heads, write_shards
from eval.speed.training_report import table_of_heads, table_of_ways, training_picture
from smartkv.errors import SmartKVError
from smartkv.io.locks import lock_folder


def training(
    out: str,
    batches: list[int] = [1024, 4096],  # noqa: B006 - jsonargparse shows it; never changed
    models: list[str] = list(SIZES),  # noqa: B006
    steps: int = 100,
    rounds: int = 5,
    window: int = 1024,
    windows: int = 16,
    threads: int = 2,
    device: str = "cpu",
    markdown_file: str | None = None,
) -> None:
    """Measure the training of gates. Digests of shards are not checked (`verify: false`): `fit` does that once, before.

    Args:
        out: folder for training.json, training.md and the picture.
        batches: keys a head an optimiser step, for all gates together against one by one (24 × 2 heads).
        models: whose numbers of heads are measured: Qwen2.5-0.5B, SmolLM2-135M, Qwen3-8B, 70B class.
        steps: optimiser steps a round.
        rounds: of both ways in turn; the median is given.
        window: tokens of a made window, half of them labelled.
        windows: made windows to train on; fewer where heads are many, and two batches at least.
        threads: CPU threads.
        device: cpu or cuda.
        markdown_file: where the tables go besides. Null: nowhere.
    """
    console = make_console()
    lock_folder(out)  # before the measurement, so that a folder in use is an error at once
    if unknown := sorted(set(models) - set(SIZES)):
        raise SmartKVError(f"models {', '.join(unknown)} are unknown: expected some of {', '.join(SIZES)}")
    if min(steps, rounds, windows, threads, *batches) < 1 or window < 4 * SINKS or not batches:
        raise SmartKVError(
            f"steps, rounds, windows, threads and batches must be at least 1, window {4 * SINKS}, some batches given"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise SmartKVError("device 'cuda' cannot be used here: torch finds no GPU")
    ways, heads = [], []
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as progress:
        task = progress.add_task("Training", total=len(batches) + len(models))
        for batch in batches:
            folder = Path(scratch) / f"{batch}"
            found = run_isolated(both_ways, folder, batch, steps, rounds, window, windows, threads, device)
            ways.append({"batch": batch, **found})
            progress.advance(task)
        for name in models:
            least = -(-2 * batches[0] // (window // 2 - SINKS))
            made = max(
                least, windows * 48 * 64 // math.prod(SIZES[name])
            )  # the same bytes for each model, or two batches
            shards = Path(scratch) / name
            run_isolated(write_shards, shards, *SIZES[name], window, made)
            measured = run_isolated(growth_of_heads, shards, batches[0], steps, threads, device)
            heads.append({"model": name, "heads": SIZES[name][0] * SIZES[name][1], **measured})
            progress.advance(task)
    arguments = {"batches": batches, "steps": steps, "rounds": rounds, "window": window, "windows": windows}
    arguments |= {"threads": threads, "device": device, "machine": machine(device)}
    tables = [table_of_ways(ways), table_of_heads(heads, batches[0])]
    figures = {"units": UNITS, "ways": ways, "heads": heads}
    result = write_result(Path(out), "training", arguments, figures)
    picture = save_picture(training_picture(ways, heads), Path(out) / "training.png")
    files = [Path(out) / "training.md", *([Path(markdown_file)] if markdown_file else [])]
    introduction = provenance("training", arguments)
    for table in tables:
        console.print(table)
    for path in [result, *(write_tables(file, tables, introduction) for file in files), picture]:
        console.print(f"  {path}", highlight=False)


UNITS = {
    "together, apart": "seconds for the same steps of all 48 heads, from files to trained gates, their keys' mean and "
    "deviation included; one by one: their keys from a file a head",
    "rounds": "the seconds of each round, of which these are the medians",
    "ratio": "one by one ÷ together, median of rounds",
    "rows_from_shards, rows_from_torch_load": "keys of all heads a second that can be read",
    "rows_trained": "keys of all heads a second that training takes",
    "rows_a_step": "keys a head of an optimiser step, mean: a batch is made of whole blocks",
    "peak_memory": "bytes, of the whole process that trains, what it read of its mapped shards among them; on a GPU "
    "what is allocated there",
}
