"""Recall trials: facts that are stated once in a long text and asked for at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.texts.facts import TEXTS, slots

FORMS = 2  # forms of each split that are used: codes and room numbers, pass keys and magic numbers


@dataclass(frozen=True)
class Trial:
    """One fact in one text. The model reads context and question and is right when it continues with the answer.

    Attributes:
        context: ids of the text, the statement in it.
        question: ids of the question, up to the answer.
        answer: ids of the answer.
        depth: share of the context before the statement.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


def trials(
    split: str, count: int, tokens: int, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Tensor], seed: int = 0
) -> list[Trial]:
    """Make trials with facts of the first two forms of a split at evenly spread depths.

    Args:
        split: train, validation or test; each has its own forms and words.
        count: number of trials.
        tokens: tokens of text around a fact.
        tokenizer: of the model.
        texts: ids `[tokens or more]`, a text for each trial.
        seed: of names and numbers.

    Raises:
        SmartKVError: there are too few texts, or they are too short.
    """
    if len(texts) < count or any(len(text) < tokens for text in texts[:count]):
        raise SmartKVError(
            f"{count} trials need as many texts of {tokens} tokens, got {len(texts)}: give longer or more texts"
        )
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
    """Make one trial.

    Args:
        split: train, validation or test.
        number: of the trial; even and odd ones have different forms.
        depth: share of the text before the statement.
        tokenizer: of the model.
        text: ids `[tokens]`.
        random: draws names and numbers.
    """
    words = slots(split, random)
    form = TEXTS["forms"][split][number % FORMS]
    statement, question, answer = (part.format(**words) for part in form)
    lead, goal = _question_and_answer(statement, question, answer)
    body, place = text.tolist(), int(depth * len(text))
    context = (*body[:place], *_ids(tokenizer, f" {statement} "), *body[place:])
    return Trial(context, _ids(tokenizer, lead), _ids(tokenizer, goal), depth)


def _question_and_answer(statement: str, question: str, answer: str) -> tuple[str, str]:
    """Return the question up to the answer's last word, and that word.

    Where the statement ends with the answer, the statement itself is repeated in place of the question: small models
    answer that best.
    """
    if statement.rstrip(".").endswith(answer):
        return f"\n\n{statement[: statement.rindex(answer)].rstrip()}", f" {answer}"
    before, _, last = answer.rpartition(" ")
    return f"\n\n{question} {before}".rstrip(), f" {last}"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
