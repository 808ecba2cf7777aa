"""RULER's tasks: what is asked has its answer in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.tasks.ruler_generator import FAMILIES, generate, string_match_all
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import prose

SHARED = Path(__file__).parents[4] / "shared" / "data" / "longctx"


def many_words(count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return ". ".join("".join(random.choice(list("abcdefgh"), 6)) for _ in range(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ruler_task_fills_its_length_and_has_its_answer_in_it(family: str) -> None:
    text, length = prose(12_000, 1), 3900
    words = many_words(400, 0)
    task = generate(family, length, text, len, [0, 1], words)
    assert length * 0.85 < len(task.text + task.prefix) <= length
    assert all(answer in task.text for answer in task.answers)
    assert string_match_all(task.reference, task.answers) == 1.0
    assert task == generate(family, length, text, len, [0, 1], words) != generate(family, length, text, len, [2], words)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_asked_for_is_stated_once_a_value(seed: int) -> None:
    for family in (family for family in FAMILIES if family.startswith("niah")):
        task = generate(family, 6000, prose(9000, 1), len, [seed])
        keys = task.prefix.split(" for ")[1].split(" mentioned")[0].replace(", and ", ", ").split(", ")
        stated = {key: [line.split(":")[0] for line in task.text.split("is: ")].count(key) for key in keys}
        found = sum(task.text.count(f" for {key} is: ") for key in keys)
        assert found == len(task.answers), stated
        if "value" in family:  # in the order in which they are read
            assert [task.text.index(answer) for answer in task.answers] == sorted(map(task.text.index, task.answers))


def test_more_keys_than_there_are_words_for_are_refused() -> None:
    with pytest.raises(SmartKVError, match="different words"):
        generate("niah_multikey_2", 20_000, "only some words " * 3000, len, [0])


def test_ruler_s_variables_lead_back_to_the_value() -> None:
    task = generate("vt", 4000, prose(9000, 1), len, [3])
    own = task.text[task.text.index("\nMemorize", 10) :]
    value = own.split("assigned the value ")[1].split(" ")[0]
    values = dict(line.removeprefix("VAR ").split(" = ") for line in own.split("\n") if line.startswith("VAR "))

    def of(name: str) -> str:
        found = values[name]
        return of(found.removeprefix("VAR ")) if found.startswith("VAR ") else found

    assert {name for name in values if of(name) == value} == set(task.answers) and len(task.answers) == 5


def test_ruler_s_words_are_the_most_common_ones() -> None:
    words = many_words(400, 0)
    task = generate("cwe", 4000, words, len, [3])
    own = task.text[task.text.index("\nBelow", 10) :].split("Question:")[0].split()
    counts = {word: own.count(word) for word in set(own) if word.isalpha()}
    assert set(sorted(counts, key=counts.__getitem__, reverse=True)[:10]) >= set(task.answers)
    task = generate("fwe", 4000, words, len, [3])
    coded = task.text.split("coded words. ")[1].split("\nQuestion")[0].split()
    most = sorted({word for word in coded if word != "..."}, key=coded.count, reverse=True)[:3]
    assert tuple(most) == task.answers and coded.count("...") > coded.count(most[0])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published sample lies beside the project, and is no part of it")
def test_ruler_s_tasks_read_like_the_published_ones() -> None:
    with (SHARED / "ruler_niah_multikey_3_4096.jsonl").open() as file:
        published = json.loads(file.readline())["input"]
    task = generate("niah_multikey_3", 8000, prose(12_000, 1), len, [0])
    own = (task.text + task.prefix).split("\n")
    theirs = published.split("\n")
    assert own[0] == theirs[0]

    def plain(line: str) -> str:
        return " ".join("uuid" if part.count("-") == 4 else part for part in line.replace(".", "").split(" "))

    assert plain(own[1]) == plain(theirs[1]) and plain(own[-1]) == plain(theirs[-1])
