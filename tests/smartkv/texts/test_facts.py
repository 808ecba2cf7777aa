"""Random facts: stated and asked for with the same values, in words and forms of their own split."""

import re
from string import Formatter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartkv.shards.manifest import SPLITS
from smartkv.texts.facts import CHAINED, FOREIGN, TEXTS, all_slots, draw_code, draw_fact, fill, gap, slots


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10_000))
def test_a_fact_states_its_answer_and_asks_for_it(split: str, seed: int) -> None:
    fact = draw_fact(split, np.random.default_rng(seed))
    words = re.findall(r"[\w-]+", fact.answer)
    assert all(word in fact.statement for word in words if any(c.isdigit() for c in word)) and words
    assert "{" not in fact.statement + fact.question + fact.answer


def test_splits_share_neither_forms_nor_words() -> None:
    for kind in ("forms", "asked"):
        parts = [{str(each) for each in TEXTS[kind][split]} for split in SPLITS]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len({TEXTS["again"][split] for split in SPLITS}) == 3
    drawn = {
        split: " ".join(draw_fact(split, np.random.default_rng(n)).statement for n in range(300)) for split in SPLITS
    }
    own = {split: set(re.findall(r"[a-z]+-[a-z]+\b", drawn[split])) for split in SPLITS}
    assert own["train"] and not own["train"] & own["test"] and not own["train"] & own["validation"]


def test_the_same_seed_draws_the_same_facts() -> None:
    first, second, other = (
        [draw_fact("train", random) for _ in range(20)] for random in map(np.random.default_rng, (3, 3, 4))
    )
    assert first == second != other


@pytest.mark.parametrize("split", SPLITS)
def test_a_chain_of_names_leads_from_the_name_that_is_asked_for_to_the_number(split: str) -> None:
    """Followed by hand: the name in the question stands for another, that for a third, which has the number."""
    start, link, question = (re.compile(_pattern(form)) for form in TEXTS["chains"][split])
    random, chains = np.random.default_rng(0), 0
    for _ in range(120):
        fact = draw_fact(split, random)
        if (asked := question.fullmatch(fact.question)) is None:
            continue
        number = {match["new"]: match["number"] for match in start.finditer(fact.statement)}
        stands_for = {match["new"]: match["old"] for match in link.finditer(fact.statement)}
        if len(stands_for) < 2 or asked["new"] in number or number.keys() & stands_for.keys():
            continue  # validation and test have 25 codes each, so two names of a chain may be the same
        chains, name = chains + 1, asked["new"]
        for _ in range(2):
            name = stands_for[name]
        assert number[name] == fact.answer
    assert chains > 5


def _pattern(form: str) -> str:
    """A regular expression for a form of chains, with a group for each slot."""
    groups = {"number": r"(?P<number>\d+)", "new": r"(?P<new>[a-z]+-[a-z]+)", "old": r"(?P<old>[a-z]+-[a-z]+)"}
    parts = Formatter().parse(form)
    return "".join(re.escape(text) + (groups[name] if name else "") for text, name, *_ in parts)


def test_the_share_of_chains_is_as_stated() -> None:
    starts = TEXTS["chains"]["test"][0].partition("{")[0]
    random = np.random.default_rng(0)
    chains = sum(draw_fact("test", random).statement.startswith(starts) for _ in range(1500))
    assert chains / 1500 == pytest.approx(CHAINED, abs=0.04)


@pytest.mark.parametrize("split", SPLITS)
def test_every_slot_of_a_split_s_forms_gets_a_value(split: str) -> None:
    names = {name for form in TEXTS["forms"][split] for part in form for _, name, *_ in Formatter().parse(part) if name}
    values = slots(split, np.random.default_rng(0))
    assert names <= set(values) and all(values.values())


def test_a_code_is_two_words_of_its_split() -> None:
    words = TEXTS["words"]["word"]
    random = np.random.default_rng(0)
    for split, places in (("train", {0, 1, 2}), ("validation", {3}), ("test", {4})):
        for _ in range(50):
            assert {words.index(word) % 5 for word in draw_code(split, random).split("-")} <= places


def test_slots_of_code_leave_the_others_as_they_are() -> None:
    for split in SPLITS:
        plain, both = (draw(split, np.random.default_rng(5)) for draw in (slots, all_slots))
        assert {name: both[name] for name in plain} == plain and len(both) == len(plain) + 10


@pytest.mark.parametrize("split", SPLITS)
def test_slots_of_code_have_their_form(split: str) -> None:
    forms = {
        "identifier": r"[a-z]+(_[a-z]+)+",
        "constant": r"[A-Z]+(_[A-Z]+)+",
        "class_name": r"([A-Z][a-z]+){2,}",
        "hex": r"0x[0-9a-f]{4,5}",
        "version": r"\d+\.\d+\.\d+",
        "path": r"(/[a-z]+){3,}",
        "port": r"\d{4}",
        "float": r"0\.\d{4}",
        "url_path": r"/v\d/[a-z]+/\d{4}",
        "email": r"[a-z]+\.[a-z]+@[a-z]+\.example",
    }
    for seed in range(40):
        values = all_slots(split, np.random.default_rng(seed))
        for name, form in forms.items():
            assert re.fullmatch(form, values[name]), (name, values[name])


def test_identifiers_of_the_splits_have_words_of_their_own() -> None:
    drawn = {
        split: {
            part
            for seed in range(300)
            for part in all_slots(split, np.random.default_rng(seed))["identifier"].split("_")
        }
        for split in SPLITS
    }
    assert not drawn["train"] & drawn["test"] and not drawn["validation"] & drawn["test"] and len(drawn["test"]) > 15


@pytest.mark.parametrize("kind", ["books", "code", "chat"])
def test_every_slot_of_the_foreign_forms_gets_a_value(kind: str) -> None:
    for form in FOREIGN[kind]:
        fact = fill(kind, form, all_slots("test", np.random.default_rng(0)))
        assert all(word in fact.statement for word in re.findall(r"\w*\d\w*", fact.answer)) and fact.answer


@pytest.mark.parametrize(
    ("lead", "between"),
    [
        *((lead, " ") for lead in ("assert x ==", "x =", "Your number is", "# a:", "x ->", "print(x)  #")),
        *((lead, "") for lead in ("f(port=", '"', "f(", "of <", "/srv/", "x\t")),
    ],
)
def test_a_space_stands_before_an_answer_where_one_belongs(lead: str, between: str) -> None:
    assert gap(lead) == between
