"""Text that asks back: facts stated once in other text, and asked for later.

A language model looks back at a fact only where something asks for it. Novels hardly ever do, so gates that learn from
novels alone forget facts that were stated once. `RecallPacker` puts into windows of ordinary text

* facts of many forms, most of them asked for later in the window at distances from 64 tokens to all of it, some never;
* chains, where a name stands for another name's value;
* passages of the text itself, to be said again in full.

Each split has forms and names of its own: what is tested was never seen in training.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from datamodules.packing import Packer, Window
from datamodules.sources import Document
from smartkv.errors import SmartKVError

SHORTEST = 64  # tokens between a fact and its question, at least
SAID_AGAIN = (24, 96)  # tokens of a passage that is repeated
FACTS = 200  # tokens of text a fact
ASKED = 0.75  # share of the facts that are asked for
RESTATED = 0.4  # share of the questions that say the fact again up to its answer
CHAINED = 1 / 6  # share of the facts that are chains
REPEATED = 1 / 3  # share of the windows that end with a passage said again

TEXTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


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


class RecallPacker:
    """Windows of one source's documents with facts in them; the same use as `Packer`.

    Args:
        tokenizer: of the model.
        window: tokens a window.
        windows_per_document: most windows taken from one document.
        seed: of everything that is drawn.
        split: whose forms are used.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, window: int, windows_per_document: int, seed: list[int], split: str
    ) -> None:
        self.packer = Packer(tokenizer, window, windows_per_document, seed)
        self.tokenizer, self.window, self.split = tokenizer, window, split
        self.random = np.random.default_rng([*seed, 1])
        self.facts = max(1, window // FACTS)

    @property
    def documents(self) -> list[str]:
        """Ids of the documents that were used."""
        return self.packer.documents

    def pack(self, documents: Iterable[Document], count: int) -> list[Window]:
        """Up to `count` windows; fewer if the texts run out."""
        return [Window(self.compose(w.tokens), w.document) for w in self.packer.pack(documents, count)]

    def compose(self, text: np.ndarray) -> np.ndarray:
        """Put facts and questions into `text` (ids int32 `[window]`), whose end is cut off to make room for them.

        Raises:
            SmartKVError: the window is too short for a fact.
        """
        prefix = len(self.packer.prefix)
        room, least = self.window - prefix, self.window // 2  # of text; half a window at least stays text
        inserted: list[tuple[float, list[int]]] = []  # where, as a share of the text, and what
        for _ in range(self.facts):
            parts = self._fact()
            size = sum(len(ids) for _, ids in parts)
            if room - size >= least:
                inserted, room = inserted + parts, room - size
        if not inserted:
            raise SmartKVError(f"windows of {self.window} tokens are too short for facts: make them longer")
        again: list[int] = []
        if self.random.random() < REPEATED:
            again = self._again(text[prefix : prefix + room // 2].tolist())
            again, room = (again, room - len(again)) if room - len(again) >= least else ([], room)
        body = text[prefix : prefix + room].tolist()
        breaks, done = self._breaks(body), 0
        ids = [*self.packer.prefix]
        for where, part in sorted(inserted, key=lambda each: each[0]):
            stop = int(breaks[np.abs(breaks - where * room).argmin()])
            ids += body[done:stop] + part
            done = stop
        return np.asarray(ids + body[done:] + again, np.int32)

    def _fact(self) -> list[tuple[float, list[int]]]:
        """A fact and, most times, its question: where each goes, and its ids."""
        random = self.random
        fact, where = draw_fact(self.split, random), random.uniform(0, 0.9)
        parts = [(where, self._ids(f" {fact.statement} "))]
        if random.random() < ASKED:
            # log-uniform distances; what would come after the end is asked at the end
            distance = np.exp(random.uniform(np.log(SHORTEST), np.log(max(self.window, SHORTEST)))) / self.window
            asked = random.choice(TEXTS["asked"][self.split]).format(question=fact.question, answer=fact.answer)
            if random.random() < RESTATED and fact.answer in fact.statement:  # small models answer this way best
                asked = f"\n\n{fact.statement[: fact.statement.rindex(fact.answer) + len(fact.answer)]}\n\n"
            parts.append((min(1.0, where + distance), self._ids(asked)))
        return parts

    def _again(self, text: list[int]) -> list[int]:
        """A passage of `text` asked for, and said again."""
        length = int(self.random.integers(*SAID_AGAIN))
        start = int(self.random.integers(0, max(1, len(text) - length)))
        passage = text[start : start + length]
        opening = self.tokenizer.decode(passage[:6])
        return self._ids(f"\n\n{TEXTS['again'][self.split].format(opening=opening)}\n") + passage

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _breaks(self, body: list[int]) -> np.ndarray:
        """Where sentences end; start and end of the text too."""
        ids = sorted(set(body))
        texts = self.tokenizer.batch_decode([[number] for number in ids])
        ends = {number for number, text in zip(ids, texts, strict=True) if text.endswith((".", "!", "?", "\n"))}
        return np.asarray([0, *(place + 1 for place, number in enumerate(body) if number in ends), len(body)])
