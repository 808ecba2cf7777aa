"""Recall texts: windows of ordinary text that state facts once and ask for them later.

A language model attends to a fact only where the text asks for it. Novels hardly ever do, so gates trained on novels
alone evict facts that were stated once. `RecallPacker` adds to windows of ordinary text:

* facts of many forms. Most are asked for later in the window, at distances from 64 tokens to the whole window;
* chains, where a name stands for another name's value;
* requests to repeat a passage of the window in full.

In code a value or a name is defined once and needed later. In conversations a user gives a value in one turn and asks
for it in a later one. Each split has forms and names of its own, so that no test fact was seen in training.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document
from smartkv.texts.packing import Packer, Window
from smartkv.texts.recall_places import KINDS

MIN_DISTANCE = 64  # tokens between a fact and its question
PASSAGE_TOKENS = (24, 96)  # range of the tokens of a repeated passage
TOKENS_PER_FACT = 200  # tokens of a window for each fact in it
ASKED = 0.75  # share of the facts that are asked for
REDRAWN = 20  # most times that a fact is drawn because another one of the window has the same question
SPARE = 2  # windows that are packed in code and conversations for each that is used, to have places for facts
REPEATED = 1 / 3  # share of the windows that end with a repeated passage


class RecallPacker:
    """Packs the documents of one source into windows and puts facts into them. It is used like a `Packer`.

    Args:
        tokenizer: Tokenizer of the model.
        window: Tokens of a window.
        windows_per_document: Most windows of one long document, unless the source runs out.
        seed: Seed of everything that is drawn.
        split: The split whose forms and words are used.
        kind: Kind of the text: `books`, `code` or `chat`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        windows_per_document: int,
        seed: list[int],
        split: str,
        kind: str = "books",
    ) -> None:
        self.packer = Packer(tokenizer, window, windows_per_document, seed)
        self.tokenizer, self.window, self.split = tokenizer, window, split
        self.kind = KINDS[kind](tokenizer)
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
        texts = self.kind.joined(documents, self.window)
        windows = self.packer.pack(texts, SPARE * count if self.kind.later else count)
        windows.sort(
            key=lambda window: not self.kind.fits(window.tokens.tolist())
        )  # those that do come first, in order
        return [Window(self.compose(w.tokens), w.document) for w in windows[:count]]

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
        inserted: list[list[tuple[float, list[int]]]] = []  # of each fact: place as a share of the text, token ids
        questions: set[str] = set()
        for _ in range(self.facts):
            parts = self._fact(questions)
            size = sum(len(ids) for _, ids in parts)
            if parts and room - size >= least:
                inserted, room = [*inserted, parts], room - size
        if not inserted:
            raise SmartKVError(f"windows of {self.window} tokens are too short for facts: make them longer")
        repeated: list[int] = []
        if self.random.random() < REPEATED:
            repeated = self._repeated_passage(text[prefix : prefix + room // 2].tolist())
            repeated, room = (repeated, room - len(repeated)) if room - len(repeated) >= least else ([], room)
        body, copied = text[prefix : prefix + room].tolist(), 0
        ids = [*self.packer.prefix]
        for stop, _, part in sorted(self._stops(inserted, body), key=lambda insertion: insertion[:2]):
            ids += body[copied:stop] + part
            copied = stop
        return np.asarray(ids + body[copied:] + repeated, np.int32)

    def _stops(
        self, inserted: list[list[tuple[float, list[int]]]], body: list[int]
    ) -> Iterator[tuple[int, float, list[int]]]:
        """Yield the position in the text of each part of each fact, its place as a share of the text, and its ids."""
        places = self.kind.places(body)
        for parts in inserted:
            nearest = [int(np.abs(places - place * len(body)).argmin()) for place, _ in parts]
            if self.kind.later and len(parts) > 1:
                nearest[1] = min(max(nearest[1], nearest[0] + 1), len(places) - 1)
            for number, (place, ids) in zip(nearest, parts, strict=True):
                yield int(places[number]), place, ids

    def _fact(self, questions: set[str]) -> list[tuple[float, list[int]]]:
        """Draw a fact and, at a share of `ASKED`, its question: the place (0–1) and the token ids of each.

        `questions` are those of the window's other facts. In code and conversations no two facts have the same one, as
        the later would contradict the earlier; nothing is returned where no other fact is found.
        """
        random = self.random
        for _ in range(REDRAWN):
            fact = self.kind.draw(self.split, random)
            if not self.kind.later or fact.question not in questions:
                break
        else:
            return []
        questions.add(fact.question)
        place = random.uniform(0, 0.9)
        parts = [(place, self._ids(self.kind.stated(fact)))]
        if random.random() < ASKED:
            # Distances are log-uniform. A question that would fall behind the end is asked at the end.
            longest = max(self.window, MIN_DISTANCE)
            distance = np.exp(random.uniform(np.log(MIN_DISTANCE), np.log(longest))) / self.window
            parts.append((min(1.0, place + distance), self._ids(self.kind.asked(fact, self.split, random))))
        return parts

    def _repeated_passage(self, text: list[int]) -> list[int]:
        """Return the request to repeat a passage of `text`, followed by the passage; nothing if the kind has none."""
        length = int(self.random.integers(*PASSAGE_TOKENS))
        start = self.kind.passage_start(text, int(self.random.integers(0, max(1, len(text) - length))))
        passage = text[start : start + length]
        request = self.kind.again(passage, self.split)
        return [] if request is None else self._ids(request) + passage

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
