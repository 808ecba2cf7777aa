"""Recall trials."""

import ast
from typing import Any

import numpy as np
import pytest
import torch

from eval.common.options import Recall
from eval.eviction.recall import Trial, check_kinds, described, trials
from smartkv.errors import SmartKVError
from smartkv.texts.facts import FOREIGN, all_slots, fill
from smartkv.texts.recall_places import KINDS
from tests.models import tiny_tokenizer, token_ids


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_trial_states_a_fact_at_its_depth_and_asks_for_it_at_the_end(split: str, tiny_lm: Any) -> None:
    texts = [token_ids(60, seed) for seed in range(6)]
    found = trials(split, 6, 60, tiny_lm.tokenizer, texts, seed=5)
    assert [trial.depth for trial in found] == pytest.approx([1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12])
    for trial, text in zip(found, texts, strict=True):
        place = int(trial.depth * 60)
        assert list(trial.context[:place]) == text[:place].tolist()
        assert list(trial.context[len(trial.context) - 60 + place :]) == text[place:].tolist()
        stated = tiny_lm.tokenizer.decode(trial.context[place : len(trial.context) - 60 + place])
        assert tiny_lm.tokenizer.decode(trial.answer).strip() in stated
    assert (
        trials(split, 6, 60, tiny_lm.tokenizer, texts, seed=5)
        == found
        != trials(split, 6, 60, tiny_lm.tokenizer, texts)
    )


SLOTS = all_slots("test", np.random.default_rng(0))
CODE = "import math\n\n\n" + "".join(f"def area_{n}(width):\n    return width * {n}\n\n\n" for n in range(40))
TALK = "".join(f"User: What is {n}?\nAssistant: It is {n}.\n" for n in range(40))


def stated_at(trial: Trial, text: list[int], places: list[int]) -> int:
    """The one of the places at which the statement stands: without it the context is the text."""
    size = len(trial.context) - len(text)
    (place, *_) = [p for p in places if [*trial.context[:p], *trial.context[p + size :]] == text]
    return place


@pytest.mark.parametrize("forms", ["own", "foreign"])
@pytest.mark.parametrize(("kind", "text"), [("code", CODE), ("chat", TALK)])
def test_a_trial_in_code_or_chats_stands_where_it_is_at_home(kind: Any, forms: Any, text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids, made = tokenizer(text)["input_ids"], KINDS[kind](tokenizer)
    around = made.closed(ids[:700])
    for trial in trials("test", 6, 700, tokenizer, [torch.tensor(ids)] * 6, 5, kind, forms):
        context, lead, answer = (tokenizer.decode(each) for each in (trial.context, trial.question, trial.answer))
        assert trial.kind == kind and lead[-1] != " " and answer.strip() in context
        place = stated_at(trial, around, made.places(around).tolist())
        assert trial.depth - 0.1 < place / len(around) < trial.depth + 0.1
        if kind == "code":
            ast.parse(context)
            assert context.endswith("\n\n") and not lead.startswith(" ")
        else:
            turns = [line.partition(":")[0] for line in (context + lead).splitlines()]
            assert turns == ["User", "Assistant"] * (len(turns) // 2)


def test_foreign_facts_in_books_stand_between_sentences_and_want_the_whole_answer() -> None:
    tokenizer = tiny_tokenizer()
    ids, made = tokenizer("The road went on. Nobody said a word. " * 20)["input_ids"][:700], KINDS["books"](tokenizer)
    for number, trial in enumerate(trials("test", 3, 700, tokenizer, [torch.tensor(ids)] * 3, 5, "books", "foreign")):
        assert abs(stated_at(trial, ids, made.places(ids).tolist()) / 700 - trial.depth) < 0.05
        size = len(fill("books", FOREIGN["books"][number], dict.fromkeys(SLOTS, "x")).answer.split())
        assert len(tokenizer.decode(trial.answer).split()) >= size and trial.kind == "books"
        assert tokenizer.decode(trial.answer).strip() in tokenizer.decode(trial.context)


def test_results_of_facts_in_books_are_described_as_before() -> None:
    assert described(Recall(), 64) == {"trials": 64, "tokens": 1900, "split": "test"}
    more = described(Recall(kinds=["books", "code"], forms="foreign"), 128)
    assert more == {"trials": 128, "tokens": 1900, "split": "test", "kinds": ["books", "code"], "forms": "foreign"}


def test_kinds_are_named_once_each() -> None:
    for kinds in ([], ["code", "code"]):
        with pytest.raises(SmartKVError, match=r"recall\.kinds must be some of books, code, chat"):
            check_kinds(Recall(kinds=kinds))
