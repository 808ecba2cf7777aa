"""Pack documents into token windows of equal length.

A long document gives up to `windows_per_document` windows, at places that the seed draws. It gives further windows only
when its source runs out. Short documents are joined, so that a window of problems is one few-shot prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from smartkv.texts.chat_format import ChatFormat
from smartkv.texts.documents import Document


@dataclass(frozen=True)
class Window:
    """One window of tokens.

    Attributes:
        tokens: Token ids, int32 `[window]`.
        document: For each token the index of its document in `Packer.documents`, int32 `[window]`.
    """

    tokens: np.ndarray
    document: np.ndarray


class Packer:
    """Packs the documents of one source into windows.

    Args:
        tokenizer: Tokenizer of the model.
        window: Tokens of a window.
        windows_per_document: Most windows of one long document, unless the source runs out.
        seed: Seed of the places in long documents.

    Attributes:
        prefix: Ids that start each window: the BOS token if the tokenizer adds one, else nothing.
        documents: Ids of the documents that were used.
        read: Number of documents that were read, empty ones included.
        tokens: Number of their tokens.
        has_chats: Whether conversations were among them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, window: int, windows_per_document: int, seed: int | list[int]
    ) -> None:
        self.tokenizer, self.window, self.windows_per_document = tokenizer, window, windows_per_document
        self.random = np.random.default_rng(seed)
        opening = tokenizer("")["input_ids"][:1]
        self.prefix = opening if opening == [tokenizer.bos_token_id] else []
        self.separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        self.documents: list[str] = []
        self.read = self.tokens = 0
        self.has_chats = False

    def pack(self, documents: Iterable[Document], count: int) -> list[Window]:
        """Pack up to `count` windows; fewer if the documents run out."""
        windows: list[Window] = []
        long: list[tuple[int, np.ndarray, list[int]]] = []  # index, tokens, starts of windows that were not used
        short: list[tuple[int, list[int]]] = []  # index, tokens with the separator; documents of the next window
        for document in documents:
            if len(windows) >= count:
                break
            ids = self._ids(document)
            self.read, self.tokens = self.read + 1, self.tokens + len(ids)
            if not ids:
                continue
            index = len(self.documents)
            self.documents.append(document.id)
            body = self.window - len(self.prefix)
            if len(ids) >= body:
                tokens = np.asarray(ids, dtype=np.int32)
                starts = (self.random.permutation(len(ids) // body) * body).tolist()
                windows += [self._cut(index, tokens, start) for start in starts[: self.windows_per_document]]
                long.append((index, tokens, starts[self.windows_per_document :]))
            else:
                short.append((index, ids + self._separator(document)))
                if sum(len(tokens) for _, tokens in short) >= body:
                    windows.append(self._join(short))
                    short = []
        windows += self._further(long, count - len(windows))
        return windows[:count]

    def _ids(self, document: Document) -> list[int]:
        """Return the token ids of a document: a conversation in the model's own format, without a BOS token."""
        self.has_chats |= bool(document.messages)
        text = self.chat.render(document.messages) if document.messages else document.text
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        opening = len(self.prefix)
        return ids[opening:] if document.messages and opening and ids[:opening] == self.prefix else ids

    def _separator(self, document: Document) -> list[int]:
        """Return the ids between a document and the next one; none where a chat template marks the end itself."""
        return [] if document.messages and not self.chat.plain else self.separator

    @cached_property
    def chat(self) -> ChatFormat:
        """The format in which the model reads conversations."""
        return ChatFormat(self.tokenizer)

    def _further(self, long: list[tuple[int, np.ndarray, list[int]]], count: int) -> Iterator[Window]:
        """Yield up to `count` further windows, one of each long document in turn."""
        while count > 0 and any(starts for _, _, starts in long):
            for index, tokens, starts in long:
                if starts and count > 0:
                    yield self._cut(index, tokens, starts.pop(0))
                    count -= 1

    def _cut(self, index: int, tokens: np.ndarray, start: int) -> Window:
        """Cut one window out of a long document."""
        body = tokens[start : start + self.window - len(self.prefix)]
        ids = np.concatenate([np.asarray(self.prefix, dtype=np.int32), body])
        return Window(ids, np.full(self.window, index, dtype=np.int32))

    def _join(self, short: list[tuple[int, list[int]]]) -> Window:
        """Join short documents to one window; the last document is cut off at its end."""
        ids, document = list(self.prefix), [short[0][0]] * len(self.prefix)
        for index, tokens in short:
            ids += tokens
            document += [index] * len(tokens)
        return Window(np.asarray(ids[: self.window], np.int32), np.asarray(document[: self.window], np.int32))


def shares(weights: list[float], count: int) -> list[int]:
    """Divide `count` by weights into whole numbers that sum to `count`, by the largest-remainder method.

    A part of 0 takes one from a part that was rounded up, if there is such: a source of small weight has a window in a
    small split too. Every part stays within one of its exact share.
    """
    exact = [weight / sum(weights) * count for weight in weights]
    rounded = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: rounded[i] - exact[i])
    for i in by_remainder[: count - sum(rounded)]:
        rounded[i] += 1
    for i in by_remainder:
        donors = [j for j in range(len(weights)) if 1 < rounded[j] > exact[j]]
        if count and not rounded[i] and donors:
            rounded[max(donors, key=lambda j: rounded[j] - exact[j])] -= 1
            rounded[i] = 1
    return rounded
