"""Anchors: tokens whose keys are never dropped (special tokens, punctuation, sinks and recent tokens)."""

import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError

CLASSES = ("special", "punctuation", "newline", "number", "word_start", "word_rest")


@dataclass(frozen=True)
class Anchors:
    """The choice of keys that random dropping never takes away.

    Args:
        sinks: Number of tokens at the start that stay, at least 0.
        recent: Number of latest tokens that every query sees, its own included, at least 1.
        special: Whether special tokens stay.
        punctuation: Whether tokens of nothing but punctuation stay, line ends included.

    Raises:
        SmartKVError: A number is too small.
    """

    sinks: int = 4
    recent: int = 64
    special: bool = True
    punctuation: bool = True

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise SmartKVError(f"sinks must be at least 0 and recent at least 1, got {self.sinks} and {self.recent}")

    def table(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Say for each token id whether its class makes it an anchor, bool `[ids]`."""
        classes = token_classes(tokenizer)
        stays = torch.zeros(len(classes), dtype=torch.bool)
        if self.special:
            stays |= classes == CLASSES.index("special")
        if self.punctuation:
            stays |= (classes == CLASSES.index("punctuation")) | (classes == CLASSES.index("newline"))
        return stays

    def always(self, ids: Tensor, table: Tensor, real: Tensor | None = None) -> Tensor:
        """Say for each token whether it is a sink or an anchor by its class; recent tokens are not considered.

        Args:
            ids: Token ids, int64 `[batch, tokens]`.
            table: Result of `table`.
            real: bool `[batch, tokens]`, False for padding. Sinks count from the first real token. None means that
                there is no padding.

        Returns:
            bool `[batch, tokens]`.
        """
        stays = table.to(ids.device)[ids]
        if real is None:
            stays[:, : self.sinks] = True
            return stays
        return (stays | (real.cumsum(dim=1) <= self.sinks)) & real


def token_classes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Classify each token id of a vocabulary.

    - special: the tokenizer's special tokens;
    - punctuation: nothing but punctuation, symbols and space;
    - newline: nothing but space, with a line end;
    - number: digits;
    - word_start: begins with a space, or is marked by the tokenizer as the start of a word;
    - word_rest: all others.

    Returns:
        Indices into `CLASSES`, int64 `[ids]`.
    """
    texts = tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    classes = [
        "special" if token_id in special else _token_class(text, token or "")
        for token_id, (text, token) in enumerate(zip(texts, tokens, strict=True))
    ]
    return torch.tensor([CLASSES.index(name) for name in classes])


def _token_class(text: str, token: str) -> str:
    """Classify a token from its decoded text and its spelling in the vocabulary."""
    bare = text.strip()
    if "\ufffd" in bare:  # a part of a character, which does not decode by itself
        return "word_rest"
    if not bare:
        return "newline" if "\n" in text else "punctuation"
    if all(unicodedata.category(letter)[0] in "PS" for letter in bare):
        return "punctuation"
    if bare.isdigit():
        return "number"
    return "word_start" if text[0].isspace() or token[:1] in ("Ġ", "▁") else "word_rest"
