"""Facts stated once in long text, and asked for at its end: what a cache that evicts must not forget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.texts.facts import TEXTS, slots

FORMS = 2  # of each split: codes and room numbers, pass keys and magic numbers


@dataclass(frozen=True)
class Trial:
    """One fact in one text. The model reads context and question, and is right when it goes on with the answer.

    Attributes:
        context: ids of the text with the statement in it.
        question: ids, up to the answer.
        answer: ids.
        depth: share of the context that stands before the statement.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


def trials(
    split: str, count: int, tokens: int, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Tensor], seed: int = 0
) -> list[Trial]:
    """Facts of the first two forms of a split at evenly spread depths.

    Args:
        split: train, validation or test; each has forms and words of its own.
        count: of trials.
        tokens: of text around a fact.
        texts: ids `[at least tokens]`, a text for each trial.
        seed: of names and numbers.

    Raises:
        SmartKVError: too few texts, or too short ones.
    """
    if len(texts) < count or any(len(text) < tokens for text in texts[:count]):
        raise SmartKVError(f"{count} trials need as many texts of {tokens} tokens")
    random = np.random.default_rng([seed, 11])
    depths = [(number + 0.5) / count for number in range(count)]
    texts = [text[:tokens] for text in texts]
    return [
        trial(split, number, depth, tokenizer, text, random)
        for number, (depth, text) in enumerate(zip(depths, texts, strict=False))
    ]


def trial(
    split: str,
    number: int,
    depth: float,
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    random: np.random.Generator,
) -> Trial:
    """One fact at a depth of `text`, ids `[tokens]`; even and odd numbers have two different forms."""
    filled = slots(split, random)
    form = TEXTS["forms"][split][number % FORMS]
    statement, question, answer = (part.format(**filled) for part in form)
    lead, goal = _asked(statement, question, answer)
    body, place = text.tolist(), int(depth * len(text))
    context = (*body[:place], *_ids(tokenizer, f" {statement} "), *body[place:])
    return Trial(context, _ids(tokenizer, lead), _ids(tokenizer, goal), depth)


def _asked(statement: str, question: str, answer: str) -> tuple[str, str]:
    """Question up to the answer's last word, and that word; where the statement ends with the answer, it is said again
    up to there: small models answer that best."""
    if statement.rstrip(".").endswith(answer):
        return f"\n\n{statement[: statement.rindex(answer)].rstrip()}", f" {answer}"
    before, _, last = answer.rpartition(" ")
    return f"\n\n{question} {before}".rstrip(), f" {last}"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
