"""Text that asks back: facts stated once in other text, and asked for later.

A language model looks back at a fact only where something asks for it. Novels hardly ever do, so gates that learn from
novels alone forget facts that were stated once. `RecallPacker` puts into windows of ordinary text

* facts of many forms, most of them asked for later in the window at distances from 64 tokens to all of it, some never;
* chains, where a name stands for another name's value;
* passages of the text itself, to be said again in full.

Each split has forms and names of its own: what is tested was never seen in training.
"""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document
from smartkv.texts.facts import TEXTS, draw_fact
from smartkv.texts.packing import Packer, Window

SHORTEST = 64  # tokens between a fact and its question, at least
SAID_AGAIN = (24, 96)  # tokens of a passage that is repeated
FACTS = 200  # tokens of text a fact
ASKED = 0.75  # share of the facts that are asked for
RESTATED = 0.4  # share of the questions that say the fact again up to its answer


REPEATED = 1 / 3  # share of the windows that end with a passage said again


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
