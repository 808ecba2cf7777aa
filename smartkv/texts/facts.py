"""Random facts that a text states once and asks for later, with words and forms of their own in each split.

The forms of facts in code and in conversations are in `recall_code.yaml` and `recall_chat.yaml`, those of their test
split in `recall_test.yaml`, whose authors have not seen the others.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CHAINED = 1 / 6  # share of the facts that are chains: a name stands for another name's value


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return content


TEXTS, CODE, CHAT, FOREIGN = map(_read, ("recall.yaml", "recall_code.yaml", "recall_chat.yaml", "recall_test.yaml"))
FORMS: dict[str, dict[str, list[list[str]]]] = {  # kind of text -> split -> forms
    "books": TEXTS["forms"],
    "code": CODE["forms"] | {"test": FOREIGN["code"]},
    "chat": CHAT["forms"] | {"test": FOREIGN["chat"]},
}
WORDS: dict[str, list[str]] = TEXTS["words"] | CODE["words"]
IN_NAMES = ("word", "object", "animal", "trade")  # kinds of words that identifiers are made of


def _word(kind: str, split: str, random: np.random.Generator) -> str:
    """Draw a word of a kind. Of every five words three are for training, one for validation and one for testing."""
    remainders = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return str(random.choice([word for number, word in enumerate(WORDS[kind]) if number % 5 in remainders]))


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


def all_slots(split: str, random: np.random.Generator) -> dict[str, str]:
    """Draw a value for each `{slot}` in the forms of a split, those for code and conversations among them."""

    def name(*more: str) -> list[str]:
        kinds = random.permutation(IN_NAMES)[: random.integers(1, 3)]
        return [*(_word(str(kind), split, random) for kind in kinds), *more]

    def suffix() -> str:
        return _word("suffix", split, random)

    return slots(split, random) | {
        "identifier": "_".join(name(suffix())),
        "constant": "_".join(name(suffix())).upper(),
        "class_name": "".join(part.capitalize() for part in name(suffix())),
        "hex": f"{random.integers(0x1000, 0x100000):#x}",
        "version": f"{random.integers(0, 20)}.{random.integers(0, 40)}.{random.integers(0, 20)}",
        "path": f"/{random.choice(['srv', 'opt', 'var', 'data', 'home'])}/"
        + "/".join(name(_word("word", split, random))),
        "port": str(random.integers(1024, 10000)),
        "float": f"0.{random.integers(100, 10000):04d}",
        "url_path": f"/v{random.integers(1, 5)}/{_word('animal', split, random)}s/{random.integers(1000, 10000)}",
        "email": f"{_word('forename', split, random).lower()}.{_word('surname', split, random).lower()}"
        f"@{_word('word', split, random)}.example",
    }


@dataclass(frozen=True)
class Fact:
    """A fact, and the question for it.

    Attributes:
        statement: Sentences that state the fact; in code, its definition; in a conversation, what the user says.
        question: The question; in code, later lines up to the answer; in a conversation, what the user asks.
        answer: The answer that a model should give.
        after: In code, what follows the answer.
        reply: In a conversation, the assistant's words to the statement.
        lead: In a conversation, the assistant's words before the answer.
    """

    statement: str
    question: str
    answer: str
    after: str = ""
    reply: str = ""
    lead: str = ""


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


def draw_fact_of(kind: str, split: str, random: np.random.Generator) -> Fact:
    """Draw a fact that stands in code or in a conversation.

    Args:
        kind: `code` or `chat`.
        split: `train`, `validation` or `test`.
        random: Generator of everything that is drawn.
    """
    chains = CODE.get("chains", {}) if kind == "code" else {}
    if split in chains and random.random() < CHAINED:
        first, second, third = (all_slots(split, random)["identifier"] for _ in range(3))
        start, link, question = chains[split]
        number = str(random.integers(10 ** random.integers(3, 6), 10**6))
        links = [link.format(new=second, old=first), link.format(new=third, old=second)]
        return Fact("\n".join([start.format(new=first, number=number), *links]), question.format(new=third), number)
    forms = FORMS[kind][split]
    return fill(kind, forms[random.integers(len(forms))], all_slots(split, random))


def fill(kind: str, form: list[str], values: dict[str, str]) -> Fact:
    """Return the fact that a form becomes with the values of its slots.

    Args:
        kind: `books`, `code` or `chat`.
        form: Its parts, in the order that the file of the form tells.
        values: Value of each slot.
    """
    parts = [part.format(**values) for part in form]
    if kind != "chat":
        return Fact(*parts)
    statement, reply, question, lead, answer = parts
    return Fact(statement, question, answer, reply=reply, lead=lead)


def gap(lead: str) -> str:
    """Return what stands between the words before an answer and the answer.

    It is a space, unless the words end with white space, an opening bracket or quote, a slash or the like.
    """
    return "" if re.search(r"""[\s"'`“‘«([{</\\_.@;-]$|(?<![-=])>$|[\w)\]]=$""", lead) else " "
