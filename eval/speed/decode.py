"""`python -m eval decode`: speed and bytes of an evicting cache beside full caches, in one run.

Each way fills its cache with the same text. Then the ways decode single tokens in turns, a few at a time, so that
whatever slows the machine for some seconds slows all of them.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from eval.common.console import make_console
from eval.common.options import Model
from eval.common.results import machine, save_picture, write_result
from eval.speed.decode_report import decode_picture, decode_table, markdown
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.ragged import Fields, Ragged
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.atomic import write_atomically
from smartkv.io.locks import lock_folder
from smartkv.metrics.perplexity import full_cache_bytes
from smartkv.models.architecture import check_model
from smartkv.models.wrappers import linear_attention_modules
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.lifetimes import FOREVER
from smartkv.policies.named import read_policy
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

ONCE = 8192  # tokens of all rows; a longer prompt is fed once, a shorter one once a round
TURN = 8  # tokens that one way decodes before the next way
WAYS = ("smartkv", "dynamic", "static", "smartkv_full")


def decode(
    out: str,
    gates: str | None = None,
    contexts: list[int] = [1024, 4096, 8000],  # noqa: B006 - jsonargparse shows it; it is never changed
    batches: list[int] = [1, 8],  # noqa: B006
    footprint: float = 0.25,
    policy: str = "all-gated",
    steps: int = 64,
    rounds: int = 3,
    sources: list[SourceConfig] = [SourceConfig("pg19")],  # noqa: B006, B008
    model: Model = Model(),  # noqa: B008
    threads: int = 2,
    chunk: int = 1024,
    markdown_file: str | None = None,
    seed: int = 0,
) -> None:
    """Measure decoding and prefill under eviction beside transformers' caches.

    Ways: smartkv (keys beyond the window at the price that gives the footprint), dynamic (transformers' DynamicCache,
    SDPA; it copies itself every step), static (its preallocated StaticCache), smartkv_full (our own slots, nothing
    evicted: the same kernels, so that only eviction differs).

    Args:
        out: folder for decode.json and the picture.
        gates: folder of exported gates, or hub id. Null: untrained gates of the same shape, which cost the same time.
        contexts: tokens in the cache when decoding starts.
        batches: rows, each with the same text.
        footprint: share of the full cache's keys, for which price and windows are solved on the text itself.
        policy: named one or YAML file.
        steps: single tokens a round and way, 8 at a time in turns; packing comes once every 64 at most, and is counted.
        rounds: of all ways; the median of the rounds' means is given. Prompts of up to 8,192 tokens, all rows
            counted, are fed as often, longer ones once.
        sources: the text.
        model: the frozen language model.
        threads: CPU threads.
        chunk: tokens of a prompt that go through the model together.
        markdown_file: where the table goes as markdown, besides. Null: nowhere.
        seed: of the choice of text, and of untrained gates.
    """
    console = make_console()
    lock_folder(out)  # before the measurement, so that a folder in use is an error at once
    if not (contexts and batches) or min(*contexts, *batches, steps, rounds, threads, chunk) < 1:
        raise SmartKVError(
            "contexts, batches, steps, rounds, threads and chunk must be at least 1, some contexts and batches given; "
            f"got {contexts}, {batches}, {steps}, {rounds}, {threads} and {chunk}"
        )
    chosen = read_policy(policy, model.architecture().layers)
    torch.set_num_threads(threads)
    lm = model.load()
    if linear_attention_modules(lm.model):
        raise SmartKVError(
            f"a {lm.architecture.model_type} has layers with linear attention, whose states the ways that are compared "
            "do not share: choose a model of another family"
        )
    longest = max(contexts) + steps * rounds
    if longest > lm.architecture.max_positions:
        raise SmartKVError(
            f"context {max(contexts)} and {steps * rounds} steps need {longest} positions, "
            f"the model has {lm.architecture.max_positions}: lower contexts, steps or rounds"
        )
    torch.manual_seed(seed)
    bank = GateBank.from_pretrained(gates, lm.model) if gates else GateBank(lm.fingerprint)
    bank = bank.to(lm.model.device).requires_grad_(False)
    plan = plan_windows(sources, {"validation": 1}, lm.tokenizer, max(contexts), seed=seed, say=console.print)
    text = plan.of_split("validation")[0].long().to(lm.model.device)
    figures = []
    with Progress(console=console) as progress, torch.inference_mode():
        task = progress.add_task("Decode", total=len(contexts) * len(batches))
        for context in contexts:
            calibration = Calibration.measure(lm.model, bank, [text[:context]], context // 2)
            solved = solve(chosen, footprint, calibration)
            for batch in batches:
                progress.update(task, description=f"{context} tokens × {batch}")
                bench = _Bench(lm.model, bank, solved, text[:context], batch, chunk)
                figures.append(bench.measure(steps, rounds))
                progress.advance(task)
    arguments = {
        "backbone": model.backbone,
        "gates": gates or "untrained",
        "texts": plan.sources,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "footprint": footprint,
        "policy": policy,
        "steps": steps,
        "rounds": rounds,
        "threads": threads,
        "chunk": chunk,
        "device": model.device,
        "seed": seed,
        "machine": machine(model.device),
    }
    units = {
        "ms_per_token": "ms a step (one token a row), the median of ms_by_round",
        "prefill": "tokens/s",
        "bytes": "of all rows' caches",
    }
    result = write_result(Path(out), "decode", arguments, {"units": units, "decode": figures})
    shown = save_picture(decode_picture(figures), Path(out) / "decode.png")
    console.print(decode_table(figures))
    if markdown_file:
        write_atomically(Path(markdown_file), markdown(arguments, figures).encode())
    console.print(f"  {result}\n  {shown}", highlight=False)


class _Timed(LifespanCache):
    """LifespanCache that adds up the seconds that its gates take."""

    seconds = 0.0

    def scores(self, layer: int, keys: Tensor) -> Tensor | None:
        """Return the gates' scores, as the cache does."""
        start = time.perf_counter()
        scores = super().scores(layer, keys)
        self.seconds += time.perf_counter() - start
        return scores


class _Bench:
    """Measurement of all ways at one context and batch size."""

    def __init__(
        self, model: PreTrainedModel, gates: GateBank, policy: HybridPolicy, text: Tensor, batch: int, chunk: int
    ) -> None:
        self.model, self.gates, self.policy, self.text, self.batch = model, gates, policy, text, batch
        self.chunk = chunk

    def measure(self, steps: int, rounds: int) -> dict[str, Any]:
        """Return the figures of this context and batch size for decode.json."""
        context = len(self.text)
        evicting, dynamic, prefill = self._prefills(rounds if self.batch * context <= ONCE else 1)
        gate_seconds, footprint, evicting.seconds = evicting.seconds, evicting.footprint, 0.0
        caches: dict[str, Cache] = {
            "smartkv": evicting,
            "dynamic": dynamic,
            "static": self._static(dynamic, context + steps * rounds),
            "smartkv_full": self._full(dynamic),
        }
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            for way, seconds in self._round(caches, context + turn * steps, steps).items():
                spent[way].append(seconds)
        full = self.batch * full_cache_bytes(self.model, evicting.get_seq_length())
        weights = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in self.model.parameters()}.values())
        return {
            "context": context,
            "batch": self.batch,
            "prefill": {way: self.batch * context / seconds for way, seconds in prefill.items()},
            "gates_share_of_prefill": gate_seconds / prefill["smartkv"],
            "ms_per_token": {way: 1e3 * statistics.median(seconds) / steps for way, seconds in spent.items()},
            "ms_by_round": {way: [1e3 * each / steps for each in seconds] for way, seconds in spent.items()},
            "gates_share_of_decode": evicting.seconds / sum(spent["smartkv"]),
            "footprint": footprint,
            "bytes": evicting.storage_bytes,
            "live_bytes": evicting.live_bytes,
            "full_bytes": full,
            "peak_bytes": evicting.peak_bytes,
            "share_of_full": evicting.storage_bytes / full,
            "limit_by_bytes": (weights + full) / (weights + evicting.storage_bytes),
        }

    def _prefills(self, passes: int) -> tuple["_Timed", DynamicCache, dict[str, float]]:
        """Feed the text `passes` times by both ways in turns.

        Returns:
            The last cache of each way, and the median seconds of each way.
        """
        seconds: dict[str, list[float]] = {"smartkv": [], "dynamic": []}
        self._prefill(DynamicCache(), 512)  # a warm-up, which is not counted
        for _ in range(passes):
            evicting = _Timed(self.model, self.gates, self.policy, self.chunk, len(self.text) // 2)
            seconds["smartkv"].append(self._prefill(evicting))
            dynamic = DynamicCache()
            seconds["dynamic"].append(self._prefill(dynamic))
        return evicting, dynamic, {way: statistics.median(each) for way, each in seconds.items()}

    def _prefill(self, cache: Cache, tokens: int | None = None) -> float:
        """Feed the text, or its first tokens, and return the seconds that it took."""
        ids = self.text[:tokens].expand(self.batch, -1)
        self._wait()
        start = time.perf_counter()
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        self._wait()
        return time.perf_counter() - start

    def _static(self, filled: Cache, room: int) -> StaticCache:
        cache = StaticCache(config=self.model.config, max_cache_len=room)
        for number, layer in enumerate(filled.layers):
            cache.update(layer.keys, layer.values, number)  # type: ignore[arg-type,union-attr]
        return cache

    def _full(self, filled: Cache) -> LifespanCache:
        """Return a LifespanCache that evicts nothing, filled with the keys and values of another cache."""
        policy = read_policy("full", check_model(self.model).layers)
        cache = LifespanCache(self.model, None, policy, self.chunk, rollback=0)
        for layer, full in zip(cache.storage, filled.layers, strict=True):
            rows, kv_heads, tokens, head_dim = full.keys.shape  # type: ignore[union-attr]
            pairs = rows * kv_heads
            position = torch.arange(tokens, device=full.keys.device).int().repeat(pairs)  # type: ignore[union-attr]
            keys, values = (tensor.reshape(-1, head_dim) for tensor in (full.keys, full.values))  # type: ignore[union-attr]
            fields = Fields(keys, values, position, torch.full_like(position, FOREVER))
            seen = torch.full((rows,), tokens, device=position.device)
            layer.restore(Ragged(fields, seen.repeat_interleave(kv_heads)), seen, keys.dtype)
            layer.columns = tokens
        return cache

    def _round(self, caches: dict[str, Cache], position: int, steps: int) -> dict[str, float]:
        """Decode `steps` single tokens by each way, in turns, and return the seconds of each way."""
        seconds = dict.fromkeys(caches, 0.0)
        for number, first in enumerate(range(0, steps, TURN)):
            for way in list(caches)[:: -1 if number % 2 else 1]:  # the order alternates
                seconds[way] += self._steps(caches[way], position + first, min(TURN, steps - first))
        return seconds

    def _steps(self, cache: Cache, position: int, steps: int) -> float:
        """Decode `steps` single tokens and return the seconds that they took."""
        token = self.text[:1].expand(self.batch, 1)
        places = torch.arange(position, position + steps, device=self.text.device)
        self._wait()
        start = time.perf_counter()
        for place in places:
            self.model(token, past_key_values=cache, position_ids=place.expand(self.batch, 1))
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.text.is_cuda:
            torch.cuda.synchronize()
