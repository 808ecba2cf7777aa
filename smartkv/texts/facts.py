"""Random facts that a text states once and asks for later, with words and forms of their own in each split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CHAINED = 1 / 6  # share of the facts that are chains: a name stands for another name's value

TEXTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("recall.yaml").read_text(encoding="utf-8"))


def _word(kind: str, split: str, random: np.random.Generator) -> str:
    """Draw a word of a kind. Of every five words three are for training, one for validation and one for testing."""
    remainders = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return str(random.choice([word for number, word in enumerate(TEXTS["words"][kind]) if number % 5 in remainders]))


def draw_code(split: str, random: np.random.Generator) -> str:
    """Draw two words joined by a hyphen, such as falcon-kernel."""
    return f"{_word('word', split, random)}-{_word('word', split, random)}"


def slots(split: str, random: np.random.Generator) -> dict[str, str]:
    """Draw a value for each `{slot}` in the forms of a split."""
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
    """A fact, and the question for it.

    Attributes:
        statement: Sentences that state the fact.
        question: The question.
        answer: The answer that a model should give.
    """

    statement: str
    question: str
    answer: str


def draw_fact(split: str, random: np.random.Generator) -> Fact:
    """Draw a fact in one of the split's forms, or, at a share of `CHAINED`, a chain of names.

    Args:
        split: `train`, `validation` or `test`.
        random: Generator of everything that is drawn.
    """
    filled = slots(split, random)
    if random.random() < CHAINED:
        first, second, third = (draw_code(split, random) for _ in range(3))
        start, link, question = TEXTS["chains"][split]
        links = [link.format(new=second, old=first), link.format(new=third, old=second)]
        statement = " ".join([start.format(new=first, number=filled["number"]), *links])
        return Fact(statement, question.format(new=third), filled["number"])
    form = TEXTS["forms"][split][random.integers(len(TEXTS["forms"][split]))]
    return Fact(*(part.format(**filled) for part in form))
