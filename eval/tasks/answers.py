"""Reads and generates the answer to a long prompt under a contender's cache."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase

from eval.contenders.base import Contender, stored_share
from eval.contenders.compressed import CompressedCache
from eval.contenders.policies import BudgetContender, PolicyContender
from smartkv.cache.attached import AttachedCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import losses_after
from smartkv.models.backbone import Backbone

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        prompt: ids of the prompt.
        answer: ids of the reference answer, whose likelihood is measured; empty: only the generated text counts.
        references: texts that a generated answer is scored against.
        group: samples of one group are averaged, such as (task, length) or (length, depth).
        classes: all possible answers, for classification.
        marked: first of the prompt's tokens that must stay in the cache, and last + 1; None: not known.
        ordered: the reference's parts have one right order; without it `right` has no meaning.
        text: first of the prompt's tokens that are text, and last + 1: those before are the instruction, those after
            the question; None: not known. A prompt that is all question has an empty text at its end.
        held_back: the cache is compressed after the text, and the question comes then.
        cluster: samples of one cluster, such as a file, are drawn together by a bootstrap; None: each by itself.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]
    group: tuple[Any, ...]
    classes: tuple[str, ...] = ()
    marked: tuple[int, int] | None = None
    ordered: bool = True
    text: tuple[int, int] | None = None
    held_back: bool = False
    cluster: str | None = None

    @property
    def pins(self) -> list[tuple[int, int]]:
        """Instruction and question: the first token of each, and last + 1; empty where they are not known."""
        return [] if self.text is None else [(0, self.text[0]), (self.text[1], len(self.prompt))]

    @property
    def compressed(self) -> int:
        """Number of the prompt's tokens that are read before the cache is compressed; the last one comes later."""
        return self.text[1] if self.held_back and self.text else len(self.prompt) - 1


def counted_from(sample: Sample) -> int:
    """Return the first query that counts for the footprint: a quarter into prompt and answer.

    Prices are solved for the same share of the queries.
    """
    return (len(sample.prompt) + len(sample.answer)) // 4


@torch.inference_mode()
def answered(lm: Backbone, contender: Contender, setting: Any, sample: Sample, new_tokens: int = 0) -> dict[str, Any]:
    """Measure the likelihood of the reference answer, and generate an answer.

    Args:
        lm: the model.
        contender: one that has `open` (see `Decoding`) or `compress` (see `CompressingRule`) generates; one that is
            simulated by a mask does not.
        setting: a result of `contender.solved`.
        sample: the question.
        new_tokens: most tokens to generate, greedily; 0: none.

    Returns:
        Figures, fit for JSON. `nll`: nats a token of the reference. `rank`: largest rank of its tokens; 0: greedy
        decoding would choose each. `right`: the rank is 0. `generated`: text, or None. `ended`: the generated text
        ended by itself. `footprint`: see `Reading`, while the reference is read (without one: while decoding).
        `stored`: see `Reading`, after the prompt. `kept`: `[layers, kv_heads]`, share of the marked tokens' keys that
        are in the cache after the prompt; None: no tokens are marked, or nothing is freed.

    Raises:
        SmartKVError: nothing is to be generated and there is no reference.
    """
    decodes = hasattr(contender, "open") or hasattr(contender, "compress")
    at_once: int | None = getattr(contender, "at_once", None)
    if not sample.answer and not (decodes and new_tokens):
        raise SmartKVError(
            f"{contender.name} generates nothing and there is no reference answer: give one, or new_tokens above 0"
        )
    if not decodes:
        tokens = torch.tensor([*sample.prompt, *sample.answer])
        reading = contender.read(setting, tokens, len(sample.prompt), counted_from(sample), None)
        return _scored(reading.nll, reading.rank) | {
            "generated": None,
            "ended": None,
            "footprint": reading.footprint,
            "stored": reading.stored,
            "kept": None,
        }
    model = lm.model
    prompt = torch.tensor([sample.prompt], device=model.device)
    with _opened(contender, setting, sample, new_tokens) as cache:
        _read_prompt(lm, cache, sample, at_once)
        figures = _usage(lm, cache, len(sample.prompt) - 1, sample)
        if sample.answer:
            figures |= _likelihood(lm, deepcopy(cache), sample, at_once)
        if not new_tokens:
            return figures | {"generated": None, "ended": None}
        output = model.generate(  # type: ignore[operator]  # a PreTrainedModel with a language head has it
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=_greedy(lm, new_tokens),
        )
        new = output[0, prompt.shape[1] :]
        text = lm.tokenizer.decode(new, skip_special_tokens=True)
        if not sample.answer:
            figures["footprint"] = _footprint(cache)
        return figures | {"generated": text, "ended": len(new) < new_tokens}


def _opened(contender: Any, setting: Any, sample: Sample, new_tokens: int) -> AbstractContextManager[Cache]:
    """Open a contender's cache: an empty one, or one that holds the compressed beginning of the prompt."""
    if isinstance(contender, BudgetContender | PolicyContender):
        plan = len(sample.prompt) + max(len(sample.answer), new_tokens)
        return contender.open(setting, counted_from(sample), plan, sample.pins)
    if hasattr(contender, "compress"):
        beginning = sample.prompt[: sample.compressed]
        return nullcontext(contender.compress(setting, beginning, counted_from(sample), sample.text))
    return contender.open(setting, counted_from(sample))


def _read_prompt(lm: Backbone, cache: Cache, sample: Sample, at_once: int | None) -> None:
    """Read what the cache does not hold of the prompt up to its last token; what is held back comes by itself."""
    ids, edge = torch.tensor([sample.prompt[:-1]], device=lm.model.device), sample.compressed
    for part in (ids[:, cache.get_seq_length() : edge], ids[:, edge:]):
        for few in part.split(at_once or max(1, part.shape[1]), dim=1):
            if few.shape[1]:
                lm.model.base_model(input_ids=few, past_key_values=cache, use_cache=True)
        if isinstance(cache, LifespanCache):
            cache.settle()


def _greedy(lm: Backbone, new_tokens: int) -> GenerationConfig:
    """Make a config that takes the likeliest token each time.

    The model's own config may have penalties for words of the prompt, so none of it is used but its end tokens.
    """
    own = lm.model.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else lm.tokenizer.eos_token_id
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad)


def _likelihood(lm: Backbone, cache: Cache, sample: Sample, at_once: int | None) -> dict[str, Any]:
    """Read the reference answer with a cache that holds the prompt up to its last token."""
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


def _usage(lm: Backbone, cache: Cache, tokens: int, sample: Sample) -> dict[str, Any]:
    """Measure the cache after the prompt: `stored` and `kept`."""
    if isinstance(cache, QuantizedCache):
        return {"stored": stored_share(lm, cache, tokens), "kept": None}
    if isinstance(cache, CompressedCache):
        return {"stored": cache.stored, "kept": None}
    if not isinstance(cache, LifespanCache):
        return {"stored": 1.0, "kept": None}
    cache.settle()
    return {"stored": stored_share(lm, cache, tokens), "kept": sample.marked and kept_share(cache, *sample.marked)}


def kept_share(cache: LifespanCache, start: int, stop: int) -> list[list[float]]:
    """Return the share of some tokens' keys that a settled cache of one row holds, `[layers, kv_heads]`.

    Args:
        cache: its pending evictions are done (`settle`).
        start: first token.
        stop: last token + 1.
    """
    return [(layer.visible(start, stop)[0] / (stop - start)).tolist() for layer in cache.storage]


def _footprint(cache: Cache) -> float:
    return cache.footprint if isinstance(cache, (LifespanCache, CompressedCache)) else 1.0


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, prefix: str = "") -> tuple[int, ...]:
    """Return the ids of a prompt.

    Args:
        tokenizer: of the model.
        text: the question.
        chat: put the question into the model's chat template.
        prefix: beginning of the answer, which is given.

    Raises:
        SmartKVError: `chat` is true and the tokenizer has no chat template.
    """
    whole, special = prompt_text(tokenizer, text, chat, prefix)
    return tuple(tokenizer(whole, add_special_tokens=special)["input_ids"])


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, prefix: str = "", shots: Sequence[tuple[str, str]] = ()
) -> tuple[str, bool]:
    """Return a prompt as text, and whether the tokenizer still has to add its special tokens.

    Args:
        tokenizer, text, chat, prefix: as for `prompt_ids`.
        shots: questions with their answers, as earlier turns of the chat.

    Raises:
        SmartKVError: `chat` is true and the tokenizer has no chat template.
    """
    if not chat:
        return text + prefix, True
    if not tokenizer.chat_template:
        raise SmartKVError("this model has no chat template: leave chat false")
    turns = [{"role": role, "content": said} for shot in shots for role, said in zip(ROLES, shot, strict=True)]
    turns.append({"role": "user", "content": text})
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)) + prefix, False


def place_of(tokenizer: PreTrainedTokenizerBase, whole: str, special: bool, part: str) -> tuple[int, int]:
    """Return which tokens of a prompt hold a part of it: the first of them, and last + 1.

    Args:
        tokenizer: of the model.
        whole, special: results of `prompt_text`.
        part: text of the prompt; a token that reaches out of it does not count.

    Raises:
        SmartKVError: the prompt does not contain the part.
    """
    start = whole.find(part)
    if start < 0 or not part:
        raise SmartKVError(f"the prompt does not contain its own text: the chat template changes '{part[:60]}'")
    stop = start + len(part)
    offsets = tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    inside = [n for n, (low, high) in enumerate(offsets) if start <= low < high <= stop]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the ids of a text that follows a prompt, without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def cut_in_the_middle(ids: Sequence[int], most: int) -> tuple[int, ...]:
    """Shorten ids to at most `most` by leaving out the middle, as LongBench does.

    Start and end of a prompt hold the instructions.
    """
    if len(ids) <= most:
        return tuple(ids)
    half = most // 2
    return (*ids[:half], *ids[len(ids) - (most - half) :])
