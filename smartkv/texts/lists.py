"""Drawn texts in which every line may be asked for: lists of facts in one form, chains of names, frequent words.

`smartkv.texts.recall` puts a few facts of many forms into books. In these texts each line is a fact of the same form,
so that gates must keep the keys of all lines, which they do not learn from books. The texts prepare for the task
families of RULER (Hsieh et al. 2024), but use none of RULER's forms. Training has other forms than validation and test.
"""

import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from smartkv.texts.documents import Document
from smartkv.texts.facts import draw_code, slots

COUNT = {"train": 260, "validation": 24, "test": 24}  # documents of each split
SEEDS = {"train": 1, "validation": 2, "test": 3}
TOKENS = (300, 960)  # range of the approximate tokens of a document
LINES = (
    "{key}: {value}",
    "The entry of {key} is {value}.",
    "{key} = {value}",
    "| {key} | {value} |",
    '"{key}": "{value}",',
    "{key} has the number {value}.",
    "<{key}>{value}</{key}>",
    "Key {key}, value {value}.",
    "The code for {key} reads {value}.",
    "- {key} -> {value}",
)
OTHER_LINES = ("Item {key} holds {value}.", "{key} ~ {value}")  # of validation and test
ASKED = ("\n\nWhat stands with {key}? {value}", "\n\nQuestion: {key}? Answer: {value}")  # or the line is repeated
KEYS = {"uuid": 0.2, "name": 0.25, "code": 0.35, "letters": 0.2}  # probability of each kind of key
VALUES = {"uuid": 0.25, "number": 0.5, "phone": 0.25}  # probability of each kind of value
SIZE = {"uuid": 24, "name": 5, "code": 6, "letters": 4, "number": 7, "phone": 8}  # approximate tokens of each kind
NOISE = (
    "The rain falls. The river is wide. The wind blows from the west. We wait and we listen.",
    "A day is long. A night is short. Then comes another day.",
    "Birds sing. Trees stand still. Nothing happens here.",
    "One two three, and again from the start.",
)
LINKS = (  # (a name gets a value, a name stands for another name)
    ("Let {name} be {value}.", "Let {name} be {other}."),
    ("{name} stands for {value}.", "{name} stands for the same as {other}."),
)
OTHER_LINKS = ("{name} means {value}.", "{name} means {other}.")  # of validation and test
WORDS = 60  # different words of a text that asks for its frequent words

Random = np.random.Generator


def documents(split: str) -> Iterator[Document]:
    """Draw the documents of a split, the same ones at each call."""
    random = np.random.default_rng(SEEDS[split])
    kinds: list[Callable[[str, int, Random], str]] = [draw_list, draw_chains, draw_frequent_words]
    for number in range(COUNT[split]):
        draw = kinds[random.choice(3, p=[0.6, 0.25, 0.15])]
        yield Document(f"{number:04d}", draw(split, int(random.integers(*TOKENS)), random))


def draw_list(split: str, tokens: int, random: Random) -> str:
    """Draw lines of one form, with a key and a value each. Some keys are asked for at the end.

    Args:
        split: The split whose forms and words are used.
        tokens: Approximate tokens of the text.
        random: Generator of everything that is drawn.
    """
    line = str(random.choice(LINES if split == "train" else OTHER_LINES))
    key_kind, value_kind = (str(random.choice(list(kinds), p=list(kinds.values()))) for kinds in (KEYS, VALUES))
    size = SIZE[key_kind] + SIZE[value_kind] + 6
    separator = str(random.choice(["\n", " "]))
    keys = list(dict.fromkeys(_draw_item(key_kind, split, random) for _ in range(max(4, int(tokens * 0.8 / size)))))
    values = {key: _draw_item(value_kind, split, random) for key in keys}
    asked = random.choice(keys, max(2, int(tokens * 0.2 / (size + 4))))
    form = str(random.choice([*ASKED, f"\n\n{line}"]))
    text = separator.join(line.format(key=key, value=values[key]) for key in keys)
    return text + "".join(form.format(key=key, value=values[key]) for key in asked)


def draw_chains(split: str, tokens: int, random: Random) -> str:
    """Draw chains of names that stand for other names, spread over repeated filler sentences.

    The end asks for all names of each value.

    Args:
        split: The split whose forms are used.
        tokens: Approximate tokens of the text.
        random: Generator of everything that is drawn.
    """
    noise = str(random.choice(NOISE))
    count, hops = int(random.integers(1, 4)), int(random.integers(2, 6))
    chains = [[_letters(65, 5, random) for _ in range(hops)] for _ in range(count)]
    values = [str(random.integers(10**4, 10**5)) for _ in chains]
    first, link = LINKS[random.integers(2)] if split == "train" else OTHER_LINKS
    parts: list[tuple[float, str]] = []  # place as a share of the text, sentences
    for names, value in zip(chains, values, strict=True):
        statements = [first.format(name=names[0], value=value)]
        statements += [link.format(name=name, other=other) for other, name in pairwise(names)]
        parts += zip(sorted(random.random(hops)), statements, strict=True)
    repeats = max(1, int(tokens * 0.85 / 20))
    parts = [(number / repeats, noise) for number in range(repeats)] + parts
    text = " ".join(sentences for _, sentences in sorted(parts, key=lambda part: part[0]))
    pairs = zip(chains, values, strict=True)
    return text + "".join(f"\n\nWhich names stand for {value}? {', '.join(names)}." for names, value in pairs)


def draw_frequent_words(split: str, tokens: int, random: Random) -> str:
    """Draw made-up words by a power law. The end names the three with the largest probability.

    Args:
        split: Not used: the words are random letters in every split.
        tokens: Approximate tokens of the text.
        random: Generator of everything that is drawn.
    """
    words = [_letters(97, int(random.integers(4, 7)), random) for _ in range(WORDS)]
    frequency = 1 / np.arange(1, WORDS + 1) ** 1.5
    text = " ".join(random.choice(words, int(tokens * 0.9 / 4), p=frequency / frequency.sum()))
    return f"{text}\n\nThe words that come most often are {words[0]}, {words[1]} and {words[2]}."


def _draw_item(kind: str, split: str, random: Random) -> str:
    """Draw a key or a value of a kind, one of `SIZE`."""
    if kind == "uuid":
        return str(uuid.UUID(bytes=random.bytes(16), version=4))
    if kind == "number":
        return str(random.integers(10**5, 10**7))
    if kind == "phone":
        return f"{random.integers(100, 1000)}-{random.integers(1000, 10000)}"
    if kind == "code":
        return draw_code(split, random)
    return _letters(65, 4, random) if kind == "letters" else slots(split, random)["name"]


def _letters(first: int, count: int, random: Random) -> str:
    """Draw letters of the alphabet whose first letter has the code `first`: 65 for A, 97 for a."""
    return "".join(chr(first + offset) for offset in random.integers(0, 26, count))
