"""The plan of a harvest: which token windows of which documents are read, fixed before anything runs."""

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
        tokens: int32 `[windows, window]`.
        document: int32 `[windows, window]`, index into `documents`.
        split: int32 `[windows]`, index into `SPLITS`; ascending, so that a shard holds one split.
        documents: "source/id" of each document.
        sources: name, origin, and windows by split of each source.
    """

    tokens: Tensor
    document: Tensor
    split: Tensor
    documents: list[str]
    sources: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """Of all tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]

    def of_split(self, split: str) -> Tensor:
        """The tokens of one split's windows, `[windows, window]`."""
        return self.tokens[self.split == SPLITS.index(split)]

    def documents_of_split(self, split: str) -> list[int]:
        """The document that each of one split's windows begins with, an index into `documents`."""
        return self.document[self.split == SPLITS.index(split), 0].tolist()


PLAN = "windows.safetensors"


@dataclass
class WindowCounts:
    """How many windows to harvest of each split."""

    train: int = 64
    validation: int = 16
    test: int = 0


def check_counts(counts: dict[str, Any]) -> None:
    """Raises SmartKVError where the windows of a split are no whole number."""
    if any(type(count) is not int for count in counts.values()):
        raise SmartKVError(f"windows must be a whole number of each split, got {counts}")


def plan_windows(
    sources: list[SourceConfig],
    counts: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    windows_per_document: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> WindowPlan:
    """Take windows from a weighted mix of sources.

    Args:
        counts: windows by split.
        window: tokens a window.
        windows_per_document: most windows taken from one long document, unless its source runs out.
        say: called with a line for the user.

    Raises:
        SmartKVError: a source that cannot be had, or texts that give no window at all.
    """
    check_counts(counts)
    if min(counts.values()) < 0 or not any(counts.values()):
        raise SmartKVError(f"windows must be 0 or more of each split and not all 0, got {counts}")
    if min(window, windows_per_document) < 1 or seed < 0:
        raise SmartKVError(
            "window and windows_per_document must be at least 1 and seed at least 0, "
            f"got {window}, {windows_per_document} and {seed}"
        )
    found = _merge([resolve_source(config, say) for config in sources])
    tokens, owners, splits = [], [], []
    documents: list[str] = []
    used: list[dict[str, Any]] = [{"name": s.name, "origin": s.origin, "windows": {}} for s in found]
    for split_index, split in enumerate(SPLITS):
        windows: list[Window] = []
        for number, (source, count) in enumerate(
            zip(found, shares([s.weight for s in found], counts.get(split, 0)), strict=True)
        ):
            drawn = _seed(seed, split_index, number)
            packer: Packer | RecallPacker = Packer(tokenizer, window, windows_per_document, drawn)
            if source.recall:
                packer = RecallPacker(tokenizer, window, windows_per_document, drawn, split)
            got = packer.pack(source.documents(split), count) if count else []
            if len(got) < count:
                say(f"source '{source.name}' has only {len(got)} of {count} {split} windows of {window} tokens")
            windows += [Window(w.tokens, w.document + len(documents)) for w in got]
            documents += [f"{source.name}/{name}" for name in packer.documents]
            used[number]["windows"][split] = len(got)
        if counts.get(split, 0) and not windows:
            raise SmartKVError(
                f"the texts give no {split} window of {window} tokens: they are empty or shorter than that; "
                "give more text, or a smaller window"
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
        used,
    )


def _merge(sources: list[Source]) -> list[Source]:
    """Sources that fell back on the built-in prose become one, with their weights added.

    Raises:
        SmartKVError: two other sources of one name.
    """
    merged: dict[str, Source] = {}
    for source in sources:
        if (there := merged.get(source.name)) is not None:
            if source.origin != "builtin" or there.origin != "builtin":
                raise SmartKVError(f"two sources are named '{source.name}': give each a name of its own")
            source = replace(source, weight=source.weight + there.weight)
        merged[source.name] = source
    return list(merged.values())


def _seed(seed: int, split: int, source: int) -> list[int]:
    return [seed, split, source + 1]


def read_plan(folder: Path) -> WindowPlan:
    """The plan beside the shards.

    Raises:
        SmartKVError: it is missing or damaged.
    """
    path = folder / PLAN
    header = read_header(path)
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in ("tokens", "document", "split")}
    return WindowPlan(**tensors, documents=header["documents"], sources=header["sources"])
