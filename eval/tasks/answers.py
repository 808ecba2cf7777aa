"""What a model answers at the end of a long prompt, under a cache that forgets or rounds."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase

from eval.contenders.base import Contender, stored_share
from smartkv.cache.attached import AttachedCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import losses_after
from smartkv.models.backbone import Backbone


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: ids.
        answer: ids of the reference, for its likelihood; empty: only what is generated counts.
        references: texts that a generated answer is scored against.
        group: what it is counted with, such as (task, length) or (length, depth).
        classes: all answers there are, for classification.
        marked: first and last + 1 of the tokens that must not be forgotten; None: not known.
        ordered: there is one right order of the reference's parts; else `right` means nothing.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]
    group: tuple[Any, ...]
    classes: tuple[str, ...] = ()
    marked: tuple[int, int] | None = None
    ordered: bool = True


def counted_from(sample: Sample) -> int:
    """Queries of the last three quarters of both texts count for the footprint, as where prices are solved."""
    return (len(sample.prompt) + len(sample.answer)) // 4


@torch.inference_mode()
def answered(lm: Backbone, contender: Contender, setting: Any, sample: Sample, new_tokens: int = 0) -> dict[str, Any]:
    """How likely the reference is, and what is generated.

    Args:
        new_tokens: to generate, greedily; 0: none. Contenders that are simulated by a mask generate nothing.

    Returns:
        For JSON. `nll`: mean over the reference's tokens, nats; `rank`: the worst of its tokens, 0 where greedy
        decoding would have said it; `right`: all of them are 0. `generated`: text, or None; `ended`: it came to its end
        by itself. `footprint` and `stored`: see `Reading`, `footprint` while the reference is read (without one: while
        decoding), `stored` after the prompt. `kept`: `[layers, kv_heads]`, share of the marked tokens' keys that are
        held then; None where nothing is marked or freed.
    """
    opened = getattr(contender, "open", None)
    if not sample.answer and (opened is None or not new_tokens):
        raise SmartKVError(
            f"{contender.name} is to generate nothing, and there is no reference whose likelihood counts"
        )
    if opened is None:
        tokens = torch.tensor([*sample.prompt, *sample.answer])
        found = contender.read(setting, tokens, len(sample.prompt), counted_from(sample), None)
        return _scored(found.nll, found.rank) | {
            "generated": None,
            "ended": None,
            "footprint": found.footprint,
            "stored": found.stored,
            "kept": None,
        }
    model = lm.model
    prompt = torch.tensor([sample.prompt], device=model.device)
    with opened(setting, counted_from(sample)) as cache:
        before = prompt[:, :-1]
        for part in before.split(contender.at_once or before.shape[1], dim=1):  # type: ignore[attr-defined]
            model.base_model(input_ids=part, past_key_values=cache, use_cache=True)
        figures = _held(lm, cache, before.shape[1], sample)
        if sample.answer:
            figures |= _likelihood(lm, deepcopy(cache), sample, contender.at_once)  # type: ignore[attr-defined]
        if not new_tokens:
            return figures | {"generated": None, "ended": None}
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=_greedy(lm, new_tokens),
        )
        said = output[0, prompt.shape[1] :]
        text = lm.tokenizer.decode(said, skip_special_tokens=True)
        if not sample.answer:
            figures["footprint"] = _footprint(cache)
        return figures | {"generated": text, "ended": len(said) < new_tokens}


def _greedy(lm: Backbone, new_tokens: int) -> GenerationConfig:
    """The likeliest token each time: what models bring along may punish words that stand in the prompt."""
    own = lm.model.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else lm.tokenizer.eos_token_id
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad)


def _likelihood(lm: Backbone, cache: Cache, sample: Sample, at_once: int | None) -> dict[str, Any]:
    ids, hidden = torch.tensor([[sample.prompt[-1], *sample.answer]], device=lm.model.device), []
    for part in ids[:, :-1].split(at_once or ids.shape[1], dim=1):
        hidden.append(lm.model.base_model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state[0])
    footprint = _footprint(cache)
    if isinstance(cache, AttachedCache):
        cache.detach()
    return _scored(*losses_after(lm.model, torch.cat(hidden), ids[0, 1:])) | {"footprint": footprint}


def _scored(nll: Tensor, rank: Tensor) -> dict[str, Any]:
    worst = int(rank.max())
    return {"nll": float(nll.double().mean()), "rank": worst, "right": worst == 0}


def _held(lm: Backbone, cache: Cache, tokens: int, sample: Sample) -> dict[str, Any]:
    if isinstance(cache, QuantizedCache):
        return {"stored": stored_share(lm, cache, tokens), "kept": None}
    if not isinstance(cache, LifespanCache):
        return {"stored": 1.0, "kept": None}
    cache.settle()
    return {"stored": stored_share(lm, cache, tokens), "kept": sample.marked and kept_of(cache, *sample.marked)}


def kept_of(cache: LifespanCache, start: int, stop: int) -> list[list[float]]:
    """Share of the keys of tokens `start … stop − 1` that a settled cache of one row holds, `[layers, kv_heads]`."""
    found = []
    for layer in cache.storage:
        marked = (layer.store.fields.position >= start) & (layer.store.fields.position < stop)
        alive = torch.bincount(layer.store.pair()[marked], minlength=layer.kv_heads)
        found.append((alive / (stop - start)).tolist())
    return found


def _footprint(cache: Cache) -> float:
    return cache.footprint if isinstance(cache, LifespanCache) else 1.0


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, prefix: str = "") -> tuple[int, ...]:
    """A prompt's ids.

    Args:
        text: what the user asks.
        chat: in the model's chat template.
        prefix: what the answer begins with, given.

    Raises:
        SmartKVError: a chat is asked for, and the tokenizer has no template.
    """
    if not chat:
        return tuple(tokenizer(text + prefix)["input_ids"])
    if not tokenizer.chat_template:
        raise SmartKVError("this model has no chat template: leave chat false")
    turns = [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(asked + prefix, add_special_tokens=False)["input_ids"])


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of what follows a prompt."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def cut_in_the_middle(ids: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many ids, the middle left out: start and end hold the instructions (as LongBench does)."""
    if len(ids) <= most:
        return tuple(ids)
    half = most // 2
    return (*ids[:half], *ids[len(ids) - (most - half) :])
