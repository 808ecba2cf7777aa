"""Tokens that always stay: special ones, punctuation, the first and the latest."""

import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError

CLASSES = ("special", "punctuation", "newline", "number", "word_start", "word_rest")


@dataclass(frozen=True)
class Anchors:
    """Which keys no random draw takes away.

    Args:
        sinks: tokens at the start that stay; 0: none.
        recent: latest tokens that every query sees, its own included; at least 1.
        special: special tokens stay.
        punctuation: tokens of nothing but punctuation stay, line ends among them.

    Raises:
        SmartKVError: fewer sinks or recent tokens than these.
    """

    sinks: int = 4
    recent: int = 64
    special: bool = True
    punctuation: bool = True

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise SmartKVError(f"sinks must be at least 0 and recent at least 1, got {self.sinks} and {self.recent}")

    def table(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Whether each id of the vocabulary stays for what it is, bool `[ids]`."""
        kinds = token_classes(tokenizer)
        stays = torch.zeros(len(kinds), dtype=torch.bool)
        if self.special:
            stays |= kinds == CLASSES.index("special")
        if self.punctuation:
            stays |= (kinds == CLASSES.index("punctuation")) | (kinds == CLASSES.index("newline"))
        return stays

    def always(self, ids: Tensor, table: Tensor, real: Tensor | None = None) -> Tensor:
        """Whether the key of each token stays for good, bool like `ids`; the latest tokens are no matter of it.

        Args:
            ids: int64 `[batch, tokens]`.
            table: of `table`.
            real: bool like `ids`, False for padding, which is no sink; None: there is none.
        """
        stays = table.to(ids.device)[ids]
        if real is None:
            stays[:, : self.sinks] = True
            return stays
        return (stays | (real.cumsum(dim=1) <= self.sinks)) & real


def token_classes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Index into `CLASSES` of each id, int64 `[ids]`.

    special: the tokenizer's own; punctuation: nothing but punctuation, symbols and space; newline: with a line end and
    nothing else but space; number: digits; word_start: after a space, or first in its word; word_rest: all else.
    """
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    raw = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    kinds = [
        "special" if number in special else _kind(text, token or "")
        for number, (text, token) in enumerate(zip(texts, raw, strict=True))
    ]
    return torch.tensor([CLASSES.index(kind) for kind in kinds])


def _kind(text: str, token: str) -> str:
    bare = text.strip()
    if "\ufffd" in bare:  # part of a letter
        return "word_rest"
    if not bare:
        return "newline" if "\n" in text else "punctuation"
    if all(unicodedata.category(letter)[0] in "PS" for letter in bare):
        return "punctuation"
    if bare.isdigit():
        return "number"
    return "word_start" if text[0].isspace() or token[:1] in ("Ġ", "▁") else "word_rest"
