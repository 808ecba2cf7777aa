"""Texts in which every line may be asked for: lists of facts of one form, chains in noise, counted words.

`smartkv.texts.recall` puts a few facts of many forms into books. Where every line is a fact of the same form, gates
have to keep all of the keys and values, and learn nothing of it from books. No form here is one of RULER's, whose
families (Hsieh et al. 2024) are what this is for; training has forms of its own.
"""

import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from smartkv.texts.documents import Document
from smartkv.texts.facts import draw_code, slots

COUNT = {"train": 260, "validation": 24, "test": 24}  # documents
SEEDS = {"train": 1, "validation": 2, "test": 3}
TOKENS = (300, 960)  # of a document, about
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
OTHER_LINES = ("Item {key} holds {value}.", "{key} ~ {value}")  # not in training
ASKED = ("\n\nWhat stands with {key}? {value}", "\n\nQuestion: {key}? Answer: {value}")  # or the line itself
KEYS = {"uuid": 0.2, "name": 0.25, "code": 0.35, "letters": 0.2}  # how often
VALUES = {"uuid": 0.25, "number": 0.5, "phone": 0.25}
SIZE = {"uuid": 24, "name": 5, "code": 6, "letters": 4, "number": 7, "phone": 8}  # tokens, about
NOISE = (
    "The rain falls. The river is wide. The wind blows from the west. We wait and we listen.",
    "A day is long. A night is short. Then comes another day.",
    "Birds sing. Trees stand still. Nothing happens here.",
    "One two three, and again from the start.",
)
LINKS = (  # a name gets a value, a name stands for another name
    ("Let {name} be {value}.", "Let {name} be {other}."),
    ("{name} stands for {value}.", "{name} stands for the same as {other}."),
)
OTHER_LINKS = ("{name} means {value}.", "{name} means {other}.")
WORDS = 60  # of a text in which words are counted

Random = np.random.Generator


def documents(split: str) -> Iterator[Document]:
    """The split's texts, the same at each call."""
    random = np.random.default_rng(SEEDS[split])
    kinds: list[Callable[[str, int, Random], str]] = [listed, chained, counted]
    for number in range(COUNT[split]):
        make = kinds[random.choice(3, p=[0.6, 0.25, 0.15])]
        yield Document(f"{number:04d}", make(split, int(random.integers(*TOKENS)), random))


def listed(split: str, tokens: int, random: Random) -> str:
    """Lines of one form, a key and a value each; some are asked for at the end."""
    line = str(random.choice(LINES if split == "train" else OTHER_LINES))
    kind, held = (str(random.choice(list(often), p=list(often.values()))) for often in (KEYS, VALUES))
    size = SIZE[kind] + SIZE[held] + 6
    between = str(random.choice(["\n", " "]))
    names = list(dict.fromkeys(_drawn(kind, split, random) for _ in range(max(4, int(tokens * 0.8 / size)))))
    values = {name: _drawn(held, split, random) for name in names}
    asked = random.choice(names, max(2, int(tokens * 0.2 / (size + 4))))
    form = str(random.choice([*ASKED, f"\n\n{line}"]))
    text = between.join(line.format(key=name, value=values[name]) for name in names)
    return text + "".join(form.format(key=name, value=values[name]) for name in asked)


def chained(split: str, tokens: int, random: Random) -> str:
    """Names that stand for other names, far apart in sentences that repeat; all of a value's names are asked for."""
    noise = str(random.choice(NOISE))
    count, hops = int(random.integers(1, 4)), int(random.integers(2, 6))
    chains = [[_letters(65, 5, random) for _ in range(hops)] for _ in range(count)]
    values = [str(random.integers(10**4, 10**5)) for _ in chains]
    first, link = LINKS[random.integers(2)] if split == "train" else OTHER_LINKS
    parts: list[tuple[float, str]] = []  # where, as a share of the text, and what
    for names, value in zip(chains, values, strict=True):
        said = [first.format(name=names[0], value=value)]
        said += [link.format(name=name, other=other) for other, name in pairwise(names)]
        parts += zip(sorted(random.random(hops)), said, strict=True)
    times = max(1, int(tokens * 0.85 / 20))
    parts = [(place / times, noise) for place in range(times)] + parts
    text = " ".join(said for _, said in sorted(parts, key=lambda part: part[0]))
    pairs = zip(chains, values, strict=True)
    return text + "".join(f"\n\nWhich names stand for {value}? {', '.join(names)}." for names, value in pairs)


def counted(split: str, tokens: int, random: Random) -> str:
    """Words that come more or less often; the three that should come most are named at the end."""
    words = [_letters(97, int(random.integers(4, 7)), random) for _ in range(WORDS)]
    often = 1 / np.arange(1, WORDS + 1) ** 1.5
    text = " ".join(random.choice(words, int(tokens * 0.9 / 4), p=often / often.sum()))
    return f"{text}\n\nThe words that come most often are {words[0]}, {words[1]} and {words[2]}."


def _drawn(kind: str, split: str, random: Random) -> str:
    if kind == "uuid":
        return str(uuid.UUID(bytes=random.bytes(16), version=4))
    if kind == "number":
        return str(random.integers(10**5, 10**7))
    if kind == "phone":
        return f"{random.integers(100, 1000)}-{random.integers(1000, 10000)}"
    if kind == "code":
        return draw_code(split, random)
    return _letters(65, 4, random) if kind == "letters" else slots(split, random)["name"]


def _letters(start: int, count: int, random: Random) -> str:
    return "".join(chr(start + place) for place in random.integers(0, 26, count))
