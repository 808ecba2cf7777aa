"""Whole models: decode steps, prompts, labels, and the memory of a long answer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from eval.gpu.shapes import AGES, evicting_cache, full_cache, keys_bytes, random_gates
from eval.gpu.timing import first_line, replay_seconds, seconds
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.paged import MAX_SPARE
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.policies.hybrid import HybridPolicy, LayerRule

POLICY = HybridPolicy((LayerRule("all", "gated", AGES[0]),), name="gpu")
SHARE = 0.25  # of the full cache's keys, for prompts and answers
ROOM = 4 * MAX_SPARE  # tokens that a cache has room for beside its context
STEPS = MAX_SPARE  # that one figure is the mean of, so that packing is in it
FREE = 0.8  # share of the free memory that a cell may take


def enough_memory(model: PreTrainedModel, batch: int, context: int) -> bool:
    """Return whether a full cache and the copy that growing it makes fit in the memory that is free."""
    if model.device.type != "cuda":
        return True
    return 2 * keys_bytes(model, batch, context) < FREE * torch.cuda.mem_get_info()[0]


def decode_steps(model: PreTrainedModel, batch: int, context: int, share: float) -> Iterator[dict[str, Any]]:
    """Yield each way's milliseconds a step, eager and, where it can be captured, as a graph; and its cache's bytes."""
    gates = random_gates(model)
    for way in ("SmartKV", "SmartKV, budget", "static", "dynamic"):
        if way.startswith("SmartKV"):
            cache: Cache = evicting_cache(model, gates, batch, context, share, "budget" in way)
        else:
            cache = full_cache(model, way, batch, context, context + ROOM)
        step = _step(model, cache, batch, context)

        def several(step: Callable[[], None] = step) -> None:
            for _ in range(STEPS):
                step()

        figures: dict[str, Any] = {"way": way, "eager_ms": 1e3 * seconds(several, model.device, 2, 1) / STEPS}
        figures["bytes"] = keys_bytes(model, batch, context)
        if isinstance(cache, LifespanCache):
            figures["bytes"] = cache.storage_bytes
            cache.detach()
        elif model.device.type == "cuda" and way == "static":
            try:
                figures["captured_ms"] = 1e3 * replay_seconds(step, model.device, calls=20)
            except RuntimeError as reason:
                figures["note"] = f"not captured: {first_line(reason)}"
        yield figures


def _step(model: PreTrainedModel, cache: Cache, batch: int, context: int) -> Callable[[], None]:
    """Return a function that decodes one more token of each row."""
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    place = torch.full((batch, 1), context, device=model.device)

    def step() -> None:
        model(ids, past_key_values=cache, position_ids=place)
        place.add_(1)

    return step


def prefill(model: PreTrainedModel, batch: int, context: int) -> Iterator[dict[str, Any]]:
    """Yield tokens a second of a prompt by each way."""
    gates = random_gates(model)
    ids = torch.randint(model.config.vocab_size, (batch, context), device=model.device)

    def evicting() -> None:
        with LifespanCache(model, gates, POLICY, footprint=SHARE, rollback=0) as cache:
            model(ids, past_key_values=cache, logits_to_keep=1)

    def growing() -> None:
        model(ids, past_key_values=DynamicCache(), logits_to_keep=1)

    for way, call in (("SmartKV", evicting), ("dynamic", growing)):
        yield {"way": way, "tokens_per_second": batch * context / seconds(call, model.device, 2, 1)}


def harvest(model: PreTrainedModel, tokens: int) -> Iterator[dict[str, Any]]:
    """Yield tokens a second of labelling a window, for one threshold and for all labels, beside a forward pass."""
    ids = torch.randint(model.config.vocab_size, (tokens,), device=model.device)
    one, every = LabelSpec((0.05,), (), tokens // 2), LabelSpec((0.02, 0.05, 0.11), (16,), tokens // 2)
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: model.base_model(input_ids=ids[None], use_cache=False),
        "one label": lambda: label_window(model, ids, one),
        "all labels": lambda: label_window(model, ids, every),
    }
    for way, call in ways.items():
        yield {"way": way, "tokens_per_second": tokens / seconds(call, model.device, 3, 1)}


def memory_of_an_answer(model: PreTrainedModel, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Decode a long answer under a budget.

    Returns:
        The bytes of the cache, and what torch has allocated and reserved beside the model.
    """
    gates, cuda = random_gates(model), model.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    with LifespanCache(model, gates, POLICY, max_tokens=int(SHARE * context), rollback=0) as cache:
        ids = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
        model(ids, past_key_values=cache, logits_to_keep=1)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            model(ids[:, :1], past_key_values=cache)
        figures: dict[str, Any] = {"way": f"{steps:,} steps", "storage_bytes": cache.storage_bytes}
        figures["held"] = float(cache.live_keys.float().mean())
        if cuda:
            figures["allocated_bytes"] = torch.cuda.memory_allocated() - before
            figures["reserved_bytes"] = torch.cuda.memory_reserved() - before
            figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return figures
