"""Drawn texts in which every line may be asked for."""

import re

import numpy as np
import pytest

from eval.tasks.ruler_generator import RULER
from smartkv.shards.manifest import SPLITS
from smartkv.texts.lists import (
    COUNT,
    LINES,
    LINKS,
    NOISE,
    OTHER_LINES,
    OTHER_LINKS,
    documents,
    draw_chains,
    draw_frequent_words,
    draw_list,
)
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows
from tests.models import tiny_tokenizer

VALUE = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{3}-\d{4}|\d{6,7}"


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_s_texts_are_the_same_at_each_call_and_no_other_split_s(split: str) -> None:
    texts = [document.text for document in documents(split)]
    assert texts == [document.text for document in documents(split)] and len(set(texts)) == len(texts) == COUNT[split]
    others = {document.text for other in SPLITS if other != split for document in documents(other)}
    assert not others & set(texts)


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_asked_for_at_the_end_of_a_list_was_stated(split: str) -> None:
    for seed in range(40):
        stated, *asked = re.split(r"\n\n", draw_list(split, 600, np.random.default_rng(seed)))
        assert len(asked) >= 2
        for question in asked:
            value = re.findall(VALUE, question)[-1]  # a key may be a uuid too
            assert stated.count(value) >= 1


def test_all_names_of_a_chain_s_value_are_said_and_were_linked() -> None:
    for seed in range(40):
        statements, *asked = draw_chains("train", 600, np.random.default_rng(seed)).split("\n\n")
        for question in asked:
            value, names = re.fullmatch(r"Which names stand for (\d+)\? (.+)\.", question).groups()
            first, *others = names.split(", ")
            assert re.search(rf"{first} (be|stands for) {value}", statements)
            for name, other in zip(others, [first, *others], strict=False):
                assert re.search(rf"{name} (be|stands for the same as) {other}", statements)


def test_the_words_that_are_named_are_among_those_that_come_often() -> None:
    among_frequent = []
    for seed in range(40):
        text, naming = draw_frequent_words("train", 900, np.random.default_rng(seed)).split("\n\n")
        words = text.split()
        often = sorted(set(words), key=words.count, reverse=True)[:6]
        among_frequent += [word in often for word in re.findall(r"\w+", naming.split(" are ")[1].replace(" and", ","))]
    assert len(among_frequent) == 120 and np.mean(among_frequent) > 0.9


def test_no_form_is_one_of_ruler_s() -> None:
    forms = [*LINES, *OTHER_LINES, *(link for pair in (*LINKS, OTHER_LINKS) for link in pair), *NOISE]
    assert not any(word in form for form in forms for word in ("magic", "VAR", "assign"))
    assert not any(sentence in RULER["noise"] for text in NOISE for sentence in text.split(". "))


def test_windows_are_cut_from_them() -> None:
    lines: list[str] = []
    plan = plan_windows(
        [SourceConfig("lists")], {"train": 3, "validation": 2}, tiny_tokenizer(), 128, 1, 0, lines.append
    )
    assert [len(list(plan.of_split(split))) for split in ("train", "validation")] == [3, 2]
    assert [source["origin"] for source in plan.sources] == ["drawn"]
