"""Generates tasks of RULER's families (Hsieh et al. 2024, arXiv 2404.06654): text of any length with a question.

The families are needles in noise, in prose or among other needles, variables to be tracked, and words to be counted.
RULER's questions about passages (SQuAD, HotpotQA) are left out. Keys of needles are pairs of words of the prose.
"""

import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smartkv.errors import SmartKVError

RULER: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("ruler.yaml").read_text(encoding="utf-8"))
FAMILIES: tuple[str, ...] = tuple(RULER["families"])
WORD_LENGTH = 6  # letters of a coded word
SHORT = 4096  # below so many tokens, lists of common words have smaller counts, as published
EXAMPLE_SENTENCES = 10  # sentences of noise around the example of variable tracking


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        text: the prompt.
        prefix: beginning of the answer, which is given.
        answers: texts that must all be in the answer.
        reference: a right answer, as it continues after `prefix`.
        ordered: the answers have one right order; without it the reference has any of the orders.
        context: the part of `text` that is searched, between the instruction and the question.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]
    reference: str
    ordered: bool = True
    context: str = ""


class Exhausted(SmartKVError):
    """The haystack's texts are too short for a task of the size that was asked for."""


def tokens_to_generate(family: str) -> int:
    """Return the number of tokens to generate for a family, as published."""
    return RULER[_kind(family)]["tokens"]


def _kind(family: str) -> str:
    if family not in FAMILIES:
        raise SmartKVError(f"there is no family '{family}': expected {', '.join(FAMILIES)}")
    return family.partition("_")[0]


def generate(
    family: str, length: int, prose: str, count_tokens: Callable[[str], int], seed: list[int], more: str = ""
) -> Task:
    """Generate the longest task of a family that has at most `length` tokens, its answer included.

    Args:
        family: one of `FAMILIES`.
        length: tokens of prompt and answer.
        prose: text for haystacks, at least as long as the task.
        count_tokens: counts the tokens of a text.
        seed: of all that is drawn.
        more: further text from which words for lists are taken.

    Raises:
        SmartKVError: an unknown family, too short a length, or too little prose.
    """
    make = {"niah": _needles, "vt": _variables, "cwe": _common_words, "fwe": _frequent_words}[_kind(family)]
    options, room = RULER["families"][family], length - tokens_to_generate(family)

    def task_of_size(size: int) -> Task:
        text = f"{prose} {more}" if make is _common_words else prose
        return make(options, size, length, text, np.random.default_rng(seed))

    def fits(size: int) -> bool:
        try:
            task = task_of_size(size)
        except Exhausted:
            if size == _least(options):
                raise
            return False
        return count_tokens(task.text + task.prefix) <= room

    low, high = _least(options), _least(options) + 1
    if not fits(low):
        task = task_of_size(low)
        needed = count_tokens(task.text + task.prefix) + length - room
        raise SmartKVError(
            f"{length} tokens are too few for '{family}', which takes at least {needed} here: make lengths longer"
        )
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return task_of_size(low)


def _least(options: dict[str, Any]) -> int:
    return options.get("hops", options.get("count", 8)) + 2


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that a text contains, whatever the case: RULER's metric for these families."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _listed(parts: Sequence[str]) -> str:
    """Join texts as a sentence does: `a, b, and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _drawn(kind: str, words: np.ndarray, random: np.random.Generator) -> str:
    """Draw a key or a value: words, numbers or a UUID."""
    if kind == "words":
        return "-".join(str(word) for word in random.choice(words, 2))
    if kind == "numbers":
        return str(random.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


def _words(prose: str) -> np.ndarray:
    return np.array(sorted(set(re.findall(r"\b[a-z]{4,12}\b", prose))))


def _distinct(kind: str, count: int, words: np.ndarray, random: np.random.Generator) -> list[str]:
    if kind == "words" and len(words) ** 2 < 2 * count:  # drawing distinct pairs would take too long
        raise Exhausted(f"the haystack has {len(words)} different words, too few for {count} keys: give longer texts")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_drawn(kind, words, random)] = None
    return list(drawn)


def _sentences(prose: str, words: int) -> list[str]:
    """Return the first words of the prose, split into sentences."""
    taken = prose.split()[:words]
    if len(taken) < words:
        raise Exhausted(f"the haystack has {len(taken)} words, {words} are needed: give longer texts")
    return re.split(r"(?<=[.!?])\s+", " ".join(taken))


def _needles(options: dict[str, Any], size: int, length: int, prose: str, random: np.random.Generator) -> Task:
    """Make a task of needles: sentences with keys and values in a haystack."""
    kind, value_count, asked = options["values"], options.get("value_count", 1), options.get("asked", 1)
    words, count = _words(prose), options.get("key_count", 1)
    others = size if options["haystack"] == "needle" else 0
    drawn = _distinct(options["keys"], count + others, words, random)  # all at once, so that they differ
    keys = drawn[:count]
    values = {key: _distinct(kind, value_count, words, random) for key in keys}
    needle = RULER["niah"]["needle"]
    needles = [needle.format(kind=kind, key=key, value=value) for key in keys for value in values[key]]
    random.shuffle(needles)
    if options["haystack"] == "essay":
        sentences, between = _sentences(prose, 10 * size), " "
    elif options["haystack"] == "noise":
        sentences, between = [RULER["noise"]] * size, "\n"
    else:
        sentences = [needle.format(kind=kind, key=key, value=_drawn(kind, words, random)) for key in drawn[count:]]
        between = "\n"
    places = sorted(random.uniform(0, 1, len(needles)), reverse=True)
    for place, statement in zip(places, needles, strict=True):
        sentences.insert(int(place * (len(sentences) + 1)), statement)
    queries = [str(key) for key in random.choice(keys, asked, replace=False)]
    context = between.join(sentences)
    answers = [value for key in queries for value in sorted(values[key], key=context.index)]  # as they are read
    filled = {"kind": kind, "query": _listed(queries), "context": context}
    template, prefix = RULER["niah"]["template"], RULER["niah"]["prefix"]
    if len(answers) == 1:  # as published
        filled["kind"] = kind[:-1]
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        prefix = prefix[: -len("are")] + "is"
    text, reference = template.format(**filled), f" {_listed(answers)}"
    return Task(text, prefix.format(**filled), tuple(answers), reference, context=context)


def _variables(options: dict[str, Any], size: int, length: int, prose: str, random: np.random.Generator) -> Task:
    """Make a task of variable tracking, with one solved example before it, as published."""
    example = _chain(options, EXAMPLE_SENTENCES, 3, random)
    task = _chain(options, size, 5, random)
    return _after(example, task)


def _after(example: Task, task: Task) -> Task:
    """Put a solved example before a task."""
    text = f"{example.text}{example.prefix}{example.reference}\n{task.text}"
    return replace(task, text=text)


def _chain(options: dict[str, Any], size: int, letters: int, random: np.random.Generator) -> Task:
    """Make chains of assignments in noise; the first chain's variables are the answer."""
    hops = options["hops"]
    names: dict[str, None] = {}
    while len(names) < options["chains"] * (hops + 1):
        names["".join(random.choice(list(string.ascii_uppercase), letters))] = None
    sentences, first = [RULER["noise"]] * size, ""
    chains = [list(names)[start : start + hops + 1] for start in range(0, len(names), hops + 1)]
    for chain in chains:
        value = str(random.integers(10_000, 99_999))
        first = first or value
        lines = [f"VAR {chain[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in pairwise(chain)]
        for shift, place in enumerate(sorted(random.choice(len(sentences), len(lines), replace=False))):
            sentences.insert(int(place) + shift, lines[shift])
    context, words = "\n".join(sentences), RULER["vt"]
    filled = {"query": first, "count": hops + 1, "context": context}
    text, prefix = words["template"].format(**filled), words["prefix"].format(**filled)
    return Task(text, prefix, tuple(chains[0]), f" {' '.join(chains[0])}", context=context)


def _common_words(options: dict[str, Any], size: int, length: int, prose: str, random: np.random.Generator) -> Task:
    """Make a task of the most common words of a list, with one solved example before it, as published."""
    words, count = _words(prose), options["count"]
    few = length < SHORT
    example = _list(words, (20, 3, 1) if few else (40, 10, 3), count, random)
    task = _list(words, (size, 6, 1) if few else (size, options["common"], options["uncommon"]), count, random)
    return _after(example, task)


def _list(words: np.ndarray, sizes: tuple[int, int, int], count: int, random: np.random.Generator) -> Task:
    """Make a numbered list in which `count` words are more frequent than the others."""
    size, common, uncommon = sizes
    if size > len(words):
        raise Exhausted(f"the haystack has {len(words)} different words, {size} are needed: give more texts")
    drawn = [str(word) for word in random.choice(words, size, replace=False)]
    entries = drawn[:count] * common + drawn[count:] * uncommon
    random.shuffle(entries)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    reference = " " + " ".join(f"{number}. {word}" for number, word in enumerate(drawn[:count], 1))
    text = RULER["cwe"]["template"].format(context=context)
    return Task(text, RULER["cwe"]["prefix"], tuple(drawn[:count]), reference, ordered=False, context=context)


def _frequent_words(options: dict[str, Any], size: int, length: int, prose: str, random: np.random.Generator) -> Task:
    """Make a task of the most frequent coded words, whose counts follow a zeta distribution.

    The most frequent word is a row of dots, which is not asked for.
    """
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < max(8, length // 50):
        vocabulary["".join(random.choice(list(string.ascii_lowercase), WORD_LENGTH))] = None
    words = ["...", *list(vocabulary)[1:]]
    rank = np.arange(1, len(words) + 1, dtype=float)
    share = rank ** -options["alpha"]
    counts = (8 * size * share / (np.arange(1, 10**6, dtype=float) ** -options["alpha"]).sum()).astype(int)
    text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
    random.shuffle(text)
    answers = tuple(words[1:4])
    context = " ".join(text)
    prompt = RULER["fwe"]["template"].format(context=context)
    return Task(prompt, RULER["fwe"]["prefix"], answers, f" {_listed(answers)}", context=context)
