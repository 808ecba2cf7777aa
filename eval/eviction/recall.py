"""Recall trials: facts that are stated once in a long text and asked for at its end, in books, code and chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.common.options import Forms, Kind, Recall
from smartkv.errors import SmartKVError
from smartkv.texts.facts import FOREIGN, FORMS, TEXTS, all_slots, fill, gap, slots
from smartkv.texts.recall_places import KINDS, Books, Code

OWN_FORMS = 2  # forms of each split that are used in books: codes and room numbers, pass keys and magic numbers


def check_kinds(recall: Recall) -> None:
    """Check that trials have kinds of text, each of them once.

    Raises:
        SmartKVError: there is none, or one is named twice.
    """
    if recall.trials and (not recall.kinds or len(set(recall.kinds)) < len(recall.kinds)):
        raise SmartKVError(f"recall.kinds must be some of books, code, chat, each of them once, got {recall.kinds}")


def described(recall: Recall, count: int) -> dict[str, Any]:
    """Describe the trials for the results; those that are not in books, or in foreign forms, have more to say.

    Args:
        recall: their options.
        count: how many they are, of all kinds.
    """
    settings = {"trials": count, "tokens": recall.tokens, "split": recall.split}
    usual = recall.kinds == ["books"] and recall.forms == "own"
    return settings | ({} if usual or not count else {"kinds": recall.kinds, "forms": recall.forms})


@dataclass(frozen=True)
class Trial:
    """One fact in one text. The model reads context and question and is right when it continues with the answer.

    Attributes:
        context: ids of the text, the statement in it.
        question: ids of the question, up to the answer.
        answer: ids of the answer.
        depth: share of the context before the statement.
        kind: of the text.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float
    kind: Kind = "books"


def trials(
    split: str,
    count: int,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Tensor],
    seed: int = 0,
    kind: Kind = "books",
    forms: Forms = "own",
) -> list[Trial]:
    """Make trials with facts at evenly spread depths.

    Args:
        split: train, validation or test; each has its own forms and words.
        count: number of trials.
        tokens: tokens of text around a fact; in code and chats a few less, so that the text ends where a statement or
            an exchange ends.
        tokenizer: of the model.
        texts: ids `[tokens or more]`, a text for each trial. Of more than that, those with enough places for facts are
            taken.
        seed: of names and numbers.
        kind: books, code or chat.
        forms: own: the first two forms of the split in books, all of its forms in turn in code and chats. foreign:
            those of the test split whose author has not seen those of training, in turn, with the words of the split.

    Raises:
        SmartKVError: there are too few texts, or they are too short.
    """
    if len(texts) < count or any(len(text) < tokens for text in texts[:count]):
        raise SmartKVError(
            f"{count} trials need as many texts of {tokens} tokens, got {len(texts)}: give longer or more texts"
        )
    random = np.random.default_rng([seed, 11])
    depths = [(number + 0.5) / count for number in range(count)]
    if kind == "books" and forms == "own":
        pairs = zip(depths, texts, strict=False)
        return [trial(split, n, depth, tokenizer, text[:tokens], random) for n, (depth, text) in enumerate(pairs)]
    chosen = FOREIGN[kind] if forms == "foreign" else FORMS[kind][split]
    of_kind, found = KINDS[kind](tokenizer), list[Trial]()
    texts = sorted(
        texts, key=lambda text: not of_kind.fits(text[:tokens].tolist())
    )  # those that do come first, in order
    for number, (depth, text) in enumerate(zip(depths, texts, strict=False)):
        body = of_kind.united(text.tolist())[:tokens]
        form = chosen[number % len(chosen)]
        found.append(_trial_at_home(of_kind, kind, form, depth, body, all_slots(split, random)))
    return found


def _trial_at_home(
    texts: Books, kind: Kind, form: list[str], depth: float, body: list[int], values: dict[str, str]
) -> Trial:
    """Make a trial of any kind, with its statement where such a statement is at home.

    Args:
        texts: the kind of text.
        kind: its name.
        form: of the fact.
        depth: share of the text before the statement.
        body: ids of the text.
        values: of the form's slots.
    """
    fact, body = fill(kind, form, values), texts.closed(body)
    places = texts.places(body)
    if isinstance(texts, Code):
        lead, goal = texts.question_and_answer(fact)
    else:
        lead, goal = f"\n\n{fact.question}", f"{gap(fact.question)}{fact.answer}"
    place = int(places[np.abs(places - depth * len(body)).argmin()])
    context = (*body[:place], *_ids(texts.tokenizer, texts.stated(fact)), *body[place:])
    return Trial(context, _ids(texts.tokenizer, lead), _ids(texts.tokenizer, goal), depth, kind)


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
    form = TEXTS["forms"][split][number % OWN_FORMS]
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
