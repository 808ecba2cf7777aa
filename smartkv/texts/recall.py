"""Recall texts: windows of ordinary text that state facts once and ask for them later.

A language model attends to a fact only where the text asks for it. Novels hardly ever do, so gates trained on novels
alone evict facts that were stated once. `RecallPacker` adds to windows of ordinary text:

* facts of many forms. Most are asked for later in the window, at distances from 64 tokens to the whole window;
* chains, where a name stands for another name's value;
* requests to repeat a passage of the window in full.

Each split has forms and names of its own, so that no test fact was seen in training.
"""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document
from smartkv.texts.facts import TEXTS, draw_fact
from smartkv.texts.packing import Packer, Window

MIN_DISTANCE = 64  # tokens between a fact and its question
PASSAGE_TOKENS = (24, 96)  # range of the tokens of a repeated passage
TOKENS_PER_FACT = 200  # tokens of a window for each fact in it
ASKED = 0.75  # share of the facts that are asked for
RESTATED = 0.4  # share of the questions that repeat the statement up to its answer
REPEATED = 1 / 3  # share of the windows that end with a repeated passage


class RecallPacker:
    """Packs the documents of one source into windows and puts facts into them. It is used like a `Packer`.

    Args:
        tokenizer: Tokenizer of the model.
        window: Tokens of a window.
        windows_per_document: Most windows of one long document, unless the source runs out.
        seed: Seed of everything that is drawn.
        split: The split whose forms and words are used.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, window: int, windows_per_document: int, seed: list[int], split: str
    ) -> None:
        self.packer = Packer(tokenizer, window, windows_per_document, seed)
        self.tokenizer, self.window, self.split = tokenizer, window, split
        self.random = np.random.default_rng([*seed, 1])
        self.facts = max(1, window // TOKENS_PER_FACT)

    @property
    def documents(self) -> list[str]:
        """Ids of the documents that were used."""
        return self.packer.documents

    def pack(self, documents: Iterable[Document], count: int) -> list[Window]:
        """Pack up to `count` windows; fewer if the documents run out.

        Raises:
            SmartKVError: The windows are too short for a fact.
        """
        return [Window(self.compose(w.tokens), w.document) for w in self.packer.pack(documents, count)]

    def compose(self, text: np.ndarray) -> np.ndarray:
        """Put facts and questions into a window.

        Args:
            text: Token ids of the window, int32 `[window]`. Its end is cut off to make room.

        Returns:
            Token ids of the new window, int32 `[window]`. At least half of it is still the text.

        Raises:
            SmartKVError: The window is too short for a fact.
        """
        prefix = len(self.packer.prefix)
        room, least = self.window - prefix, self.window // 2  # tokens of the text that stay
        inserted: list[tuple[float, list[int]]] = []  # place as a share of the text, token ids
        for _ in range(self.facts):
            parts = self._fact()
            size = sum(len(ids) for _, ids in parts)
            if room - size >= least:
                inserted, room = inserted + parts, room - size
        if not inserted:
            raise SmartKVError(f"windows of {self.window} tokens are too short for facts: make them longer")
        repeated: list[int] = []
        if self.random.random() < REPEATED:
            repeated = self._repeated_passage(text[prefix : prefix + room // 2].tolist())
            repeated, room = (repeated, room - len(repeated)) if room - len(repeated) >= least else ([], room)
        body = text[prefix : prefix + room].tolist()
        breaks, copied = self._breaks(body), 0
        ids = [*self.packer.prefix]
        for place, part in sorted(inserted, key=lambda insertion: insertion[0]):
            stop = int(breaks[np.abs(breaks - place * room).argmin()])
            ids += body[copied:stop] + part
            copied = stop
        return np.asarray(ids + body[copied:] + repeated, np.int32)

    def _fact(self) -> list[tuple[float, list[int]]]:
        """Draw a fact and, at a share of `ASKED`, its question: the place (0–1) and the token ids of each."""
        random = self.random
        fact, place = draw_fact(self.split, random), random.uniform(0, 0.9)
        parts = [(place, self._ids(f" {fact.statement} "))]
        if random.random() < ASKED:
            # Distances are log-uniform. A question that would fall behind the end is asked at the end.
            longest = max(self.window, MIN_DISTANCE)
            distance = np.exp(random.uniform(np.log(MIN_DISTANCE), np.log(longest))) / self.window
            asked = random.choice(TEXTS["asked"][self.split]).format(question=fact.question, answer=fact.answer)
            if random.random() < RESTATED and fact.answer in fact.statement:  # the form that small models answer best
                asked = f"\n\n{fact.statement[: fact.statement.rindex(fact.answer) + len(fact.answer)]}\n\n"
            parts.append((min(1.0, place + distance), self._ids(asked)))
        return parts

    def _repeated_passage(self, text: list[int]) -> list[int]:
        """Return the request to repeat a passage of `text`, followed by the passage."""
        length = int(self.random.integers(*PASSAGE_TOKENS))
        start = int(self.random.integers(0, max(1, len(text) - length)))
        passage = text[start : start + length]
        opening = self.tokenizer.decode(passage[:6])
        return self._ids(f"\n\n{TEXTS['again'][self.split].format(opening=opening)}\n") + passage

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _breaks(self, body: list[int]) -> np.ndarray:
        """Return the positions at which a sentence ends, and the start and the end of the text."""
        ids = sorted(set(body))
        texts = self.tokenizer.batch_decode([[number] for number in ids])
        ends = {number for number, text in zip(ids, texts, strict=True) if text.endswith((".", "!", "?", "\n"))}
        return np.asarray([0, *(position + 1 for position, number in enumerate(body) if number in ends), len(body)])
