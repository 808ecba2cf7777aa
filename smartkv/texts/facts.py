"""Facts that are stated once in a text and asked for later."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CHAINED = 1 / 6  # share of the facts that are chains


TEXTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("recall.yaml").read_text(encoding="utf-8"))


def _word(kind: str, split: str, random: np.random.Generator) -> str:
    """Of five words three are for training, one for validation, one for the test."""
    places = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return str(random.choice([word for number, word in enumerate(TEXTS["words"][kind]) if number % 5 in places]))


def draw_code(split: str, random: np.random.Generator) -> str:
    """Two words, such as falcon-kernel."""
    return f"{_word('word', split, random)}-{_word('word', split, random)}"


def slots(split: str, random: np.random.Generator) -> dict[str, str]:
    """What the `{slots}` of a split's texts are filled with."""
    kinds = ("place", "colour", "animal", "object", "trade", "nickname")
    month = random.choice(TEXTS["words"]["month"])
    return {kind: _word(kind, split, random) for kind in kinds} | {
        "name": f"{_word('forename', split, random)} {_word('surname', split, random)}",
        "code": draw_code(split, random),
        "word": _word("word", split, random),
        "number": str(random.integers(10 ** random.integers(3, 6), 10**6)),
        "phone": f"{random.integers(100, 1000)}-{random.integers(1000, 10000)}",
        "year": str(random.integers(1500, 2000)),
        "time": f"{random.integers(1, 24)}:{random.integers(10, 60)}",
        "date": f"{random.integers(1, 29)} {month} {random.integers(1700, 2000)}",
        "letters": "".join(chr(65 + n) for n in random.integers(0, 26, random.integers(2, 5))),
    }


@dataclass(frozen=True)
class Fact:
    """Something that is stated, and how it is asked for. What the model has to say is `answer`."""

    statement: str
    question: str
    answer: str


def draw_fact(split: str, random: np.random.Generator) -> Fact:
    """A fact of one of the split's forms; or a chain."""
    filled = slots(split, random)
    if random.random() < CHAINED:
        first, second, third = (draw_code(split, random) for _ in range(3))
        start, link, question = TEXTS["chains"][split]
        links = [link.format(new=second, old=first), link.format(new=third, old=second)]
        statement = " ".join([start.format(new=first, number=filled["number"]), *links])
        return Fact(statement, question.format(new=third), filled["number"])
    form = TEXTS["forms"][split][random.integers(len(TEXTS["forms"][split]))]
    return Fact(*(part.format(**filled) for part in form))
