"""The window plan of a run: the token windows that it reads, fixed before the model runs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import SPLITS
from smartkv.shards.shard_file import open_tensors, read_header
from smartkv.texts.packing import Packer, Window, shares
from smartkv.texts.recall import RecallPacker
from smartkv.texts.sources import Source, SourceConfig, resolve_source


@dataclass(frozen=True)
class WindowPlan:
    """All windows of a run.

    Attributes:
        tokens: Token ids, int32 `[windows, window]`.
        document: Index of each token's document in `documents`, int32 `[windows, window]`.
        split: Index of each window's split in `SPLITS`, int32 `[windows]`. Ascending, so that a shard holds one split.
        documents: Name of each document, "source/id".
        sources: Name, origin, number of windows by split and what else was used of each source, as JSON values.
    """

    tokens: Tensor
    document: Tensor
    split: Tensor
    documents: list[str]
    sources: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a SHA-256 over all tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]

    def of_split(self, split: str) -> Tensor:
        """Return the tokens of one split's windows, int32 `[windows, window]`."""
        return self.tokens[self.split == SPLITS.index(split)]

    def documents_of_split(self, split: str) -> list[int]:
        """Return the document at the start of each of one split's windows, as an index into `documents`."""
        return self.document[self.split == SPLITS.index(split), 0].tolist()


PLAN = "windows.safetensors"  # file of the plan, in the folder of the shards


@dataclass
class WindowCounts:
    """Number of windows of each split.

    Args:
        train: Windows to train on.
        validation: Windows to validate on.
        test: Windows to test on.
    """

    train: int = 64
    validation: int = 16
    test: int = 0


class NoWindows(SmartKVError):
    """Texts that can be read, but give no window of a split."""


def check_counts(counts: dict[str, Any]) -> None:
    """Raise an error if the number of windows of a split is not a whole number.

    Args:
        counts: Number of windows by split.

    Raises:
        SmartKVError: One of them is not an int.
    """
    if any(type(count) is not int for count in counts.values()):
        raise SmartKVError(f"windows must be a whole number for each split, got {counts}")


def plan_windows(
    sources: list[SourceConfig],
    counts: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    windows_per_document: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> WindowPlan:
    """Pack windows from a weighted mix of sources.

    Args:
        sources: The sources and their weights.
        counts: Number of windows by split.
        tokenizer: Tokenizer of the model.
        window: Tokens of a window.
        windows_per_document: Most windows of one long document, unless its source runs out.
        seed: Seed of the windows and of their order.
        say: Called with a line for the user.

    Raises:
        SmartKVError: An argument is out of its range, no origin has a source, or a split gets no window (NoWindows).
    """
    check_counts(counts)
    if min(counts.values()) < 0 or not any(counts.values()):
        raise SmartKVError(f"windows must be 0 or more for each split and not all 0, got {counts}")
    if min(window, windows_per_document) < 1 or seed < 0:
        raise SmartKVError(
            "window and windows_per_document must be at least 1 and seed at least 0, "
            f"got {window}, {windows_per_document} and {seed}"
        )
    mix = _merge([resolve_source(config, say) for config in sources])
    weights = [source.weight for source in mix]
    tokens, owners, splits = [], [], []
    documents: list[str] = []
    records: list[dict[str, Any]] = [
        {"name": source.name, "origin": source.origin, **source.about, "windows": {}} for source in mix
    ]
    for split_index, split in enumerate(SPLITS):
        windows: list[Window] = []
        lacking: list[str] = []  # why sources have no window at all
        for number, (source, count) in enumerate(zip(mix, shares(weights, counts.get(split, 0)), strict=True)):
            source_seed = _seed(seed, split_index, number)
            packer: Packer | RecallPacker
            if source.recall:
                packer = RecallPacker(tokenizer, window, windows_per_document, source_seed, split, source.recall)
                plain = packer.packer
            else:
                packer = plain = Packer(tokenizer, window, windows_per_document, source_seed)
            packed = packer.pack(source.documents(split), count) if count else []
            if plain.has_chats and plain.chat.plain:
                say(f"source '{source.name}': the tokenizer has no chat template: turns are lines 'User: …'")
            if len(packed) < count:
                reason = _shortage(source, split, plain)
                lacking += [] if packed else [f"'{source.name}': {reason}"]
                say(
                    f"source '{source.name}' has only {len(packed)} of {count} {split} windows of {window} tokens: "
                    f"{reason}"
                )
            windows += [Window(each.tokens, each.document + len(documents)) for each in packed]
            documents += [f"{source.name}/{name}" for name in packer.documents]
            records[number]["windows"][split] = len(packed)
        if counts.get(split, 0) and not windows:
            raise NoWindows(
                f"the texts give no {split} window of {window} tokens ({'; '.join(lacking)}): give more text, "
                f"a smaller window, or ask for no {split} window"
            )
        order = np.random.default_rng(_seed(seed, split_index, -1)).permutation(len(windows))
        tokens += [windows[i].tokens for i in order]
        owners += [windows[i].document for i in order]
        splits += [split_index] * len(windows)
    return WindowPlan(
        torch.from_numpy(np.stack(tokens)),
        torch.from_numpy(np.stack(owners)),
        torch.tensor(splits, dtype=torch.int32),
        documents,
        records,
    )


def _shortage(source: Source, split: str, packer: Packer) -> str:
    """Return why a source gave fewer windows than asked for."""
    if packer.read:
        documents = f"{packer.read} document{'' if packer.read == 1 else 's'}"
        return f"{documents} of split {split} have {packer.tokens} tokens"
    return f"no document is in split {split}" if source.own is None else source.own.why_none(split)


def _merge(sources: list[Source]) -> list[Source]:
    """Merge the sources that fell back on the built-in prose into one, and add their weights.

    Raises:
        SmartKVError: Two other sources have the same name.
    """
    merged: dict[str, Source] = {}
    for source in sources:
        if (earlier := merged.get(source.name)) is not None:
            if source.origin != "builtin" or earlier.origin != "builtin":
                raise SmartKVError(f"two sources are named '{source.name}': give each a name of its own")
            source = replace(source, weight=source.weight + earlier.weight)
        merged[source.name] = source
    return list(merged.values())


def _seed(seed: int, split: int, source: int) -> list[int]:
    """Return the seed of one split of one source, or of the order of the split's windows for source -1."""
    return [seed, split, source + 1]


def read_plan(folder: Path) -> WindowPlan:
    """Read the window plan in a folder of shards.

    Raises:
        SmartKVError: The plan is missing or damaged.
    """
    path = folder / PLAN
    header = read_header(path)
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in ("tokens", "document", "split")}
    return WindowPlan(**tensors, documents=header["documents"], sources=header["sources"])
