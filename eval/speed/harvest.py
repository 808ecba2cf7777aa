"""`python -m eval speed`: tokens a second and peak memory of a harvest, beside eager attention that is kept.

Peak memory is measured in a separate process for each way and length. Speed is measured with all ways of a length in
turn in one process, because the speed of a shared machine changes from minute to minute.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from eval.common.console import make_console
from eval.common.isolated import run_isolated
from eval.common.options import Model
from eval.common.results import machine, provenance, save_picture, write_result, write_tables
from eval.speed.harvest_report import growth_of, growth_table, harvest_picture, harvest_table
from smartkv.errors import SmartKVError
from smartkv.io.locks import lock_folder
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.backbone import Backbone

WAYS = ("smartkv", "smartkv_all_labels", "forward", "output_attentions")


def speed(
    out: str,
    model: Model = Model(),  # noqa: B008 - jsonargparse shows it
    lengths: list[int] = [512, 1024, 2048, 4096, 8192],  # noqa: B006
    ways: list[str] = list(WAYS),  # noqa: B006
    old_way_up_to: int = 2048,
    rounds: int = 5,
    rounds_alone: int = 1,
    threads: int = 2,
    markdown_file: str | None = None,
) -> None:
    """Measure the harvest of one window.

    Args:
        out: folder for speed.json and the picture.
        model: the frozen language model.
        lengths: tokens a window.
        ways: smartkv (lifespans for one threshold, block by block), smartkv_all_labels (for three, and future
            attention), forward (the model alone with SDPA: the limit), output_attentions (eager attention kept for all
            layers, lifespans for one threshold by a vectorised scan).
        old_way_up_to: tokens; the way output_attentions is left out of longer windows.
        rounds: passes of all ways in turn, after one that is not counted; the median is given, of ratios too.
        rounds_alone: the same, of those longer windows.
        threads: CPU threads.
        markdown_file: where the table goes besides. Null: nowhere.
    """
    console = make_console()
    lock_folder(out)  # before the measurement, so that a folder in use is an error at once
    if model.device == "cuda" and not torch.cuda.is_available():
        raise SmartKVError("device 'cuda' cannot be used here: torch finds no GPU")
    if unknown := sorted(set(ways) - set(WAYS)):
        raise SmartKVError(f"ways {', '.join(unknown)} are unknown: expected some of {', '.join(WAYS)}")
    if not (ways and lengths) or min(rounds, rounds_alone, threads, old_way_up_to) < 1 or min(lengths) < 2:
        raise SmartKVError(
            "rounds, rounds_alone, threads and old_way_up_to must be at least 1, lengths 2, and some ways and lengths "
            f"given; got {rounds}, {rounds_alone}, {threads}, {old_way_up_to}, {lengths} and {ways}"
        )
    limit = model.architecture().max_positions
    if max(lengths) > limit:
        raise SmartKVError(
            f"lengths go up to {max(lengths)} tokens, '{model.backbone}' has {limit} positions: leave those out"
        )
    figures = []
    for length in lengths:
        there = [way for way in ways if way != "output_attentions" or length <= old_way_up_to]
        rows = [{"way": way, "tokens": length, **run_isolated(_pass, way, model, threads, length)} for way in there]
        possible = [row["way"] for row in rows if "note" not in row]
        times = _timed(possible, model, threads, length, rounds if length <= old_way_up_to else rounds_alone)
        for row in rows:
            row |= times.get(row["way"], {})
            console.print(_line(row), highlight=False)
        figures += rows
    arguments = {"backbone": model.backbone, "dtype": model.dtype, "rounds": rounds, "threads": threads}
    arguments |= {"device": model.device, "rounds_alone": rounds_alone, "old_way_up_to": old_way_up_to}
    arguments |= {"machine": machine(model.device)}
    units = {
        "tokens_per_second": "tokens/s, median of rounds",
        "seconds": "of each pass, all ways in turn",
        "peak_memory": "bytes, of the whole process in one pass; on a GPU what is allocated there",
        "exponent": "of tokens, with which time grows: slope of a line through the logarithms of all lengths",
        "bytes_a_token": "slope of a line through peak memory at all lengths",
        "off_the_line": "largest distance of a peak from that line ÷ the peak: near 0 where memory is linear",
    }
    folder = Path(out)
    growth = {way: growth_of(figures, way) for way in ways}
    result = write_result(folder, "speed", arguments, {"units": units, "harvest": figures, "growth": growth})
    picture = save_picture(harvest_picture(figures), folder / "harvest_speed.png")
    tables = [harvest_table(figures), growth_table(growth)]
    for table in tables:
        console.print(table)
    written = [write_tables(Path(markdown_file), tables, provenance("speed", arguments))] if markdown_file else []
    for path in [result, *written, picture]:
        console.print(f"  {path}", highlight=False)


def _pass(way: str, model: Model, threads: int, length: int) -> dict[str, Any]:
    """Run one pass in this process, whose peak memory is measured."""
    lm, tokens = _loaded(model, threads, length)
    arch = lm.architecture
    attentions = arch.layers * arch.query_heads * length**2 * lm.model.dtype.itemsize
    # eager attention also holds one layer's float32 scores and softmax, and the mask
    needed = attentions + 3 * arch.query_heads * length**2 * 4
    free = torch.cuda.mem_get_info()[0] if model.device == "cuda" else psutil.virtual_memory().available
    if way == "output_attentions" and needed > free:
        return {"note": f"needs {needed / 2**30:.0f} GiB"}
    _run(way, lm, tokens)
    return {"peak_memory": torch.cuda.max_memory_allocated()} if model.device == "cuda" else {}


def _timed(ways: list[str], model: Model, threads: int, length: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return each way's seconds and tokens a second, or a note why there are none."""
    if not ways:
        return {}
    measured = run_isolated(_seconds, ways, model, threads, length, rounds)
    if "note" not in measured:
        taken = {way: measured[way] for way in ways}
        return {way: {"tokens_per_second": length / statistics.median(s), "seconds": s} for way, s in taken.items()}
    if len(ways) > 1 and "output_attentions" in ways:  # the memory did not suffice for it beside the others
        rest = _timed([way for way in ways if way != "output_attentions"], model, threads, length, rounds)
        return rest | {"output_attentions": {"note": measured["note"]}}
    return {way: {"note": measured["note"]} for way in ways}


def _seconds(ways: list[str], model: Model, threads: int, length: int, rounds: int) -> dict[str, Any]:
    """Return each way's seconds a pass, all ways in turn, after a round that is not counted."""
    lm, tokens = _loaded(model, threads, length)
    taken = [[_run(way, lm, tokens) for way in ways] for _ in range(rounds + 1)][1:]
    return {way: list(column) for way, column in zip(ways, zip(*taken, strict=True), strict=True)}


def _loaded(model: Model, threads: int, length: int) -> tuple[Backbone, Tensor]:
    torch.set_num_threads(threads)
    lm = model.load()
    tokens = torch.randint(lm.model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    return lm, tokens.to(model.device)


def _run(way: str, lm: Backbone, tokens: Tensor) -> float:
    """Run one pass and return its seconds."""
    run = {
        "smartkv": _smartkv,
        "smartkv_all_labels": _smartkv_all_labels,
        "forward": _forward,
        "output_attentions": _output_attentions,
    }[way]
    lm.model.set_attn_implementation("eager" if way == "output_attentions" else "sdpa")
    start = time.perf_counter()
    with torch.inference_mode():
        run(lm, tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _smartkv(lm: Backbone, tokens: Tensor) -> None:
    label_window(lm.model, tokens, LabelSpec((0.05,), (), len(tokens) // 2))


def _smartkv_all_labels(lm: Backbone, tokens: Tensor) -> None:
    label_window(lm.model, tokens, LabelSpec((0.02, 0.05, 0.11), (128,), len(tokens) // 2))


def _forward(lm: Backbone, tokens: Tensor) -> None:
    lm.model.base_model(input_ids=tokens[None], use_cache=False)


def _output_attentions(lm: Backbone, tokens: Tensor) -> list[Tensor]:
    """Return the lifespans for one threshold, `[kv_heads, keys]` a layer, from attention matrices that are kept."""
    output = lm.model.base_model(input_ids=tokens[None], use_cache=False, output_attentions=True)
    query = torch.arange(len(tokens), device=tokens.device)
    lifespans = []
    for attention in output.attentions:  # [1, query_heads, queries, keys]
        strongest = attention[0].unflatten(0, (lm.architecture.kv_heads, -1)).amax(dim=1)
        last = torch.where(strongest > 0.05, query[:, None], -1).amax(dim=1)  # [kv_heads, keys]
        lifespans.append((last - query + 1).clamp(min=1))
    return lifespans


def _line(figure: dict[str, Any]) -> str:
    head = f"{figure['way']:>18} {figure['tokens']:>6} tokens: "
    if "note" in figure:
        return head + figure["note"]
    return head + f"{figure['tokens_per_second']:.0f} tokens/s, peak {figure['peak_memory'] / 2**30:.2f} GiB"
