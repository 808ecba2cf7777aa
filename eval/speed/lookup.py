"""`python -m eval lookup`: prompt lookup decoding with and without eviction, in one run.

Prompt lookup drafts the next tokens from earlier places of the text, and the model checks a whole draft in one call.
Drafts that it refuses are taken back out of the cache (`LifespanCache.crop`).
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from eval.common.console import make_console, say_once
from eval.common.contender_styles import contender_label
from eval.common.options import Model, NamedTexts, check_names
from eval.common.results import machine, provenance, write_result, write_tables
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.locks import lock_folder
from smartkv.models.backbone import Backbone
from smartkv.texts.windows import plan_windows

FULL = "full"


@dataclass(frozen=True)
class Generated:
    """One generated text.

    Attributes:
        tokens_per_second: of the tokens after the first call's.
        calls: of the model, after the prompt's.
        drafted: tokens that prompt lookup proposed.
        accepted: those of them that the model would have said itself.
        ids: the new tokens.
    """

    tokens_per_second: float
    calls: int
    drafted: int
    accepted: int
    ids: list[int]


@dataclass(frozen=True)
class LookupRow:
    """One cache on the prompts of one kind of text.

    Attributes:
        kind: name of the kind of text.
        contender: full, or gates@budget with its footprint.
        greedy, lookup: tokens a second without and with prompt lookup, median over prompts.
        speedup: median over prompts of lookup ÷ greedy.
        acceptance: share of the drafted tokens that were accepted; None: none was drafted.
        tokens_per_call: tokens a call of the model with prompt lookup.
        same: share of the prompts on which both say the same text; arithmetic in another order may decide a tie.
        prompts: number of prompts.
    """

    kind: str
    contender: str
    greedy: float
    lookup: float
    speedup: float
    acceptance: float | None
    tokens_per_call: float
    same: float
    prompts: int


def lookup(
    out: str,
    gates: str | None = None,
    texts: list[NamedTexts] = [NamedTexts(name="code", windows=4)],  # noqa: B006, B008
    context: int = 2048,
    new_tokens: int = 128,
    footprints: list[float] = [0.25],  # noqa: B006
    draft: int = 10,
    model: Model = Model(),  # noqa: B008
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Measure prompt lookup decoding with a full cache and under budgets: tokens a second, and drafts accepted.

    The ways go on with the same texts greedily, one after another on each text, and all generate equally many tokens.

    Args:
        out: folder for lookup.json and lookup.md.
        gates: folder of exported gates, hub id, or name. Null: untrained gates of the same shape, which cost the same
            time.
        texts: kinds of text, whose windows are the prompts.
        context: tokens of a prompt.
        new_tokens: tokens that are generated after each.
        footprints: budgets, as shares of the full cache's keys of prompt and new tokens.
        draft: most tokens that are drafted at once.
        model: the frozen language model.
        threads: CPU threads.
        seed: of the choice of windows, and of untrained gates.
    """
    console = make_console()
    lock_folder(out)  # before the measurement, so that a folder in use is an error at once
    _check(texts, footprints, context, new_tokens, draft, threads, model.architecture().max_positions)
    torch.set_num_threads(threads)
    lm = model.load()
    torch.manual_seed(seed)
    bank = GateBank.from_pretrained(gates, lm.model) if gates else GateBank(lm.fingerprint)
    bank = bank.to(lm.model.device).requires_grad_(False)
    say, rows = say_once(console), list[LookupRow]()
    with Progress(console=console) as progress:
        task = progress.add_task("Prompt lookup", total=sum(text.windows for text in texts))
        for text in texts:
            progress.update(task, description=text.name)
            counts: dict[str, int] = {text.split: text.windows}
            plan = plan_windows(text.sources, counts, lm.tokenizer, context, 1, seed, say)
            read: dict[str, list[tuple[Generated, Generated]]] = {}
            for prompt in plan.of_split(text.split):
                for name, cache in _caches(lm, bank, footprints):
                    pair = (
                        _generate(lm, next(cache), prompt, new_tokens, None),
                        _generate(lm, next(cache), prompt, new_tokens, draft),
                    )
                    read.setdefault(name, []).append(pair)
                progress.advance(task)
            rows += [_row(text.name, name, pairs) for name, pairs in read.items()]
    settings = {
        "backbone": model.backbone,
        "gates": gates or "untrained",
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "context": context,
        "new_tokens": new_tokens,
        "footprints": footprints,
        "draft": draft,
        "threads": threads,
        "seed": seed,
        "machine": machine(model.device),
    }
    _leave(console, Path(out), settings, rows)


def _check(
    texts: list[NamedTexts],
    footprints: list[float],
    context: int,
    new_tokens: int,
    draft: int,
    threads: int,
    positions: int,
) -> None:
    if not texts:
        raise SmartKVError("there must be texts: give at least one kind")
    check_names(texts)
    if min(context, draft, threads) < 1 or new_tokens < 2:
        raise SmartKVError(
            "context, draft and threads must be at least 1 and new_tokens at least 2, got "
            f"{context}, {draft}, {threads} and {new_tokens}"
        )
    if not footprints or not all(0 < f <= 1 for f in footprints):
        raise SmartKVError(f"footprints are shares of the full cache above 0 and at most 1, got {footprints}")
    if context + new_tokens > positions:
        raise SmartKVError(
            f"{context} tokens and {new_tokens} new ones are more than the model's {positions} positions: lower them"
        )


def _caches(lm: Backbone, gates: GateBank, footprints: list[float]) -> list[tuple[str, Iterator[Cache]]]:
    """Return the name of each way, and new caches of it without end."""

    def full() -> Iterator[Cache]:
        while True:
            yield DynamicCache()

    def budget(footprint: float) -> Iterator[Cache]:
        while True:
            yield LifespanCache(lm.model, gates, footprint=footprint)

    return [(FULL, full()), *((f"gates@budget {footprint:g}", budget(footprint)) for footprint in footprints)]


class _Times(StoppingCriteria):
    """Notes after each call of the model when it came and how long the text is; it stops nothing."""

    def __init__(self) -> None:
        self.noted: list[tuple[float, int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.noted.append((time.perf_counter(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Collect the number of tokens of each call of the model."""
    sizes: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(int((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@torch.inference_mode()
def _generate(lm: Backbone, cache: Cache, prompt: Tensor, new_tokens: int, draft: int | None) -> Generated:
    """Go on with a prompt `[tokens]`, greedily; `draft`: most tokens that prompt lookup proposes, None: none."""
    ids, times = prompt.long()[None].to(lm.model.device), _Times()
    end = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=end,
        eos_token_id=lm.tokenizer.eos_token_id,
        prompt_lookup_num_tokens=draft,
    )
    with _counted(lm.model) as sizes:
        output = lm.model.generate(  # type: ignore[operator]  # a PreTrainedModel with a language head has it
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([times]),
        )
    if isinstance(cache, LifespanCache):
        cache.detach()
    new = output[0, ids.shape[1] :].tolist()
    (start, before), (stop, after) = times.noted[0], times.noted[-1]
    drafted = sum(sizes) - ids.shape[1] - (len(sizes) - 1)  # each call after the first reads a token that is no draft
    accepted = len(new) - len(sizes)  # each call says one token of its own
    return Generated((after - before) / (stop - start), len(sizes) - 1, drafted, max(0, accepted), new)


def _row(kind: str, name: str, pairs: list[tuple[Generated, Generated]]) -> LookupRow:
    drafted = sum(looked.drafted for _, looked in pairs)
    calls = sum(looked.calls + 1 for _, looked in pairs)
    return LookupRow(
        kind,
        name,
        statistics.median(plain.tokens_per_second for plain, _ in pairs),
        statistics.median(looked.tokens_per_second for _, looked in pairs),
        statistics.median(looked.tokens_per_second / plain.tokens_per_second for plain, looked in pairs),
        sum(looked.accepted for _, looked in pairs) / drafted if drafted else None,
        sum(len(looked.ids) for _, looked in pairs) / calls,
        sum(plain.ids == looked.ids for plain, looked in pairs) / len(pairs),
        len(pairs),
    )


UNITS = {
    "greedy": "tokens a second without prompt lookup, after the prompt; median over prompts",
    "lookup": "the same with it",
    "speedup": "median over prompts of lookup ÷ greedy",
    "acceptance": "drafted tokens that the model would have said itself ÷ drafted tokens",
    "tokens_per_call": "new tokens ÷ calls of the model, with prompt lookup",
    "same": "share of the prompts on which both ways say the same text",
}


def _leave(console: Console, out: Path, settings: dict[str, Any], rows: list[LookupRow]) -> None:
    table = Table(title=f"{settings['backbone']}: prompt lookup after {settings['context']:,} tokens")
    for name in ("kind", "cache", "greedy, tokens/s", "with lookup", "×", "accepted", "tokens a call", "same text"):
        table.add_column(name, justify="left" if name in ("kind", "cache") else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if number and rows[number - 1].kind != row.kind:
            table.add_section()
        accepted = "–" if row.acceptance is None else f"{row.acceptance:.0%}"
        figures = f"{row.greedy:.1f}", f"{row.lookup:.1f}", f"{row.speedup:.2f}", accepted, f"{row.tokens_per_call:.2f}"
        table.add_row(row.kind, contender_label(row.contender), *figures, f"{row.same:.0%}")
    table.caption = f"Medians over {rows[0].prompts} prompts, {settings['new_tokens']} new tokens each."
    paths = [write_result(out, "lookup", settings, {"units": UNITS, "rows": [asdict(row) for row in rows]})]
    paths.append(write_tables(out / "lookup.md", [table], provenance("lookup", settings)))
    console.print(table)
    for path in paths:
        console.print(f"  {path}", highlight=False)
