"""Documents -> windows of equal length.

A long document gives up to `windows_per_document` windows at places drawn by the seed (all the rest only if the source
runs out otherwise); short ones are put one after another, so that a packed window of problems is one few-shot prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from smartkv.texts.documents import Document


@dataclass(frozen=True)
class Window:
    """`tokens` int32 `[window]`, and for each token the index of its document in the source's list."""

    tokens: np.ndarray
    document: np.ndarray


class Packer:
    """Cuts one source's documents into windows; remembers the ids of the documents that it used."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, window: int, windows_per_document: int, seed: int | list[int]
    ) -> None:
        self.tokenizer, self.window, self.windows_per_document = tokenizer, window, windows_per_document
        self.random = np.random.default_rng(seed)
        opening = tokenizer("")["input_ids"][:1]
        self.prefix = (
            opening if opening == [tokenizer.bos_token_id] else []
        )  # what the model expects first, if anything
        self.separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        self.documents: list[str] = []

    def pack(self, documents: Iterable[Document], count: int) -> list[Window]:
        """Up to `count` windows; fewer if the texts run out."""
        windows: list[Window] = []
        left: list[tuple[int, np.ndarray, list[int]]] = []  # documents that have more windows to give
        short: list[tuple[int, list[int]]] = []
        for document in documents:
            if len(windows) >= count:
                break
            ids = self.tokenizer(document.text, add_special_tokens=False)["input_ids"]
            if not ids:
                continue
            index = len(self.documents)
            self.documents.append(document.id)
            body = self.window - len(self.prefix)
            if len(ids) >= body:
                tokens = np.asarray(ids, dtype=np.int32)
                starts = (self.random.permutation(len(ids) // body) * body).tolist()
                windows += [self._cut(index, tokens, s) for s in starts[: self.windows_per_document]]
                left.append((index, tokens, starts[self.windows_per_document :]))
            else:
                short.append((index, ids))
                if sum(len(i) + len(self.separator) for _, i in short) >= body:
                    windows.append(self._join(short))
                    short = []
        windows += self._rest(left, count - len(windows))
        return windows[:count]

    def _rest(self, left: list[tuple[int, np.ndarray, list[int]]], count: int) -> Iterator[Window]:
        """More windows, one a document in turn."""
        while count > 0 and any(starts for _, _, starts in left):
            for index, tokens, starts in left:
                if starts and count > 0:
                    yield self._cut(index, tokens, starts.pop(0))
                    count -= 1

    def _cut(self, index: int, tokens: np.ndarray, start: int) -> Window:
        body = tokens[start : start + self.window - len(self.prefix)]
        ids = np.concatenate([np.asarray(self.prefix, dtype=np.int32), body])
        return Window(ids, np.full(self.window, index, dtype=np.int32))

    def _join(self, short: list[tuple[int, list[int]]]) -> Window:
        """Short documents, one after another; the last is cut where the window ends."""
        ids, owner = list(self.prefix), [short[0][0]] * len(self.prefix)
        for index, tokens in short:
            ids += tokens + self.separator
            owner += [index] * (len(tokens) + len(self.separator))
        return Window(np.asarray(ids[: self.window], np.int32), np.asarray(owner[: self.window], np.int32))


def shares(weights: list[float], count: int) -> list[int]:
    """`count` divided by weights, largest remainder first: whole numbers that sum to `count`."""
    exact = [weight / sum(weights) * count for weight in weights]
    parts = [int(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts
