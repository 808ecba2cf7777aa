"""The manifest of a folder of shards, and the format of the shards that it lists.

A shard is one safetensors file for a run of whole windows. It holds the keys and labels of all heads:

=================== ======= ================================================ ==========================================
tensor              dtype   shape                                            meaning
=================== ======= ================================================ ==========================================
`keys`              float16 `[layers, kv_heads, tokens, head_dim]`           before the rotary embedding
`keys_post_rope`    float16 the same                                         after it (optional)
`lifespan`          int32   `[thresholds, layers, kv_heads, tokens]`         tokens, as seen in the window, not capped
`future_attention`  float32 `[ages, layers, kv_heads, tokens]`               mean probability, or NaN (optional)
`horizon`           int32   `[tokens]`                                       later queries that the window still held
`position`          int32   `[tokens]`                                       place in the window
`token`             int32   `[tokens]`                                       token id
`document`          int32   `[tokens]`                                       index into the manifest's documents
`split`             int32   `[tokens]`                                       index into `SPLITS`
=================== ======= ================================================ ==========================================

Every file is written under a temporary name, synced and renamed, so that a file that exists is whole. Its header holds
a digest of its content (`smartkv.shards.shard_file`). The manifest is written last. Nothing is ever unpickled.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically
from smartkv.io.checks import check_number, check_type, check_whole, read_dataclass
from smartkv.labels.lifespans import LabelSpec
from smartkv.models.architecture import Fingerprint
from smartkv.shards.shard_file import open_tensors, read_header

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")


def shard_header(fingerprint: Fingerprint, spec: LabelSpec, window: int, sinks: int) -> dict[str, Any]:
    """Make the header that every shard of a harvest has, as JSON reads it back.

    Shards of early versions have no `sinks` in their header.
    """
    labels = {"thresholds": list(spec.thresholds), "ages": list(spec.ages), "follow_up": spec.follow_up}
    cut = {"window": window, "sinks": sinks}
    return {"format_version": FORMAT_VERSION, "fingerprint": asdict(fingerprint), **labels, **cut}


@dataclass(frozen=True)
class ShardEntry:
    """The manifest's entry for one shard.

    Attributes:
        file: Name of the file in the manifest's folder.
        split: "train", "validation" or "test".
        windows: Number of windows.
        tokens: Number of tokens.
        bytes: Size of the file.
        sha256: SHA-256 of the file.
    """

    file: str
    split: str
    windows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards.

    Attributes:
        folder: Folder that the manifest was read from.
        fingerprint: Architecture of the model that made the keys.
        spec: Thresholds, ages and follow-up of the labels.
        window: Tokens per window.
        sinks: Number of tokens at the start of each window that are left out of training and scoring.
        sources: Name, origin ("local", "hub", "builtin"), windows and documents by split of each text source.
        documents: Ids of the documents, indexed by the shards' `document`.
        arguments: Arguments of the harvest, with the model's name and the versions of libraries.
        shards: Entries of the shards, in order.
    """

    folder: Path
    fingerprint: Fingerprint
    spec: LabelSpec
    window: int
    sinks: int
    sources: list[dict[str, Any]]
    documents: list[str]
    arguments: dict[str, Any]
    shards: list[ShardEntry]

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """The model's own window in each layer, as in `Architecture.sliding_windows`."""
        return tuple(self.arguments.get("sliding_windows", ()))

    def write(self) -> None:
        """Write `manifest.json`, as the last step of a harvest."""
        data = {"format_version": FORMAT_VERSION, **asdict(self)}
        del data["folder"]
        write_atomically(self.folder / MANIFEST, json.dumps(data, indent=1, sort_keys=True).encode())

    @classmethod
    def read(cls, folder: Path | str) -> "Manifest":
        """Read a folder's manifest and check the existence, size and header of every shard that it lists.

        Raises:
            SmartKVError: A file is missing, truncated, foreign, or outside the folder. The message names it.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise SmartKVError(
                f"{path} is missing: '{folder}' is not a folder of shards, or its harvest has not finished "
                "(run the same harvest command again, it continues where it stopped)"
            )
        try:
            data = json.loads(path.read_text())
            if data["format_version"] != FORMAT_VERSION:
                raise SmartKVError(
                    f"{path} has format version {data['format_version']}, this SmartKV reads {FORMAT_VERSION}"
                )
            spec = data["spec"]
            manifest = cls(
                folder=folder,
                fingerprint=read_dataclass(Fingerprint, data["fingerprint"], least=1),
                spec=LabelSpec(
                    tuple(check_number("thresholds", threshold) for threshold in spec["thresholds"]),
                    tuple(check_whole("ages", age, 1) for age in spec["ages"]),
                    check_whole("follow_up", spec["follow_up"], 1),
                ),
                shards=[read_dataclass(ShardEntry, entry) for entry in check_type("shards", data["shards"], list)],
                window=check_whole("window", data["window"], 1),
                sinks=check_whole("sinks", data["sinks"]),
                sources=check_type("sources", data["sources"], list),
                documents=check_type("documents", data["documents"], list),
                arguments=check_type("arguments", data["arguments"], dict),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SmartKVError(
                f"{path} is damaged ({type(error).__name__}: {error}): run the same harvest again"
            ) from error
        if not manifest.shards:
            raise SmartKVError(f"{path} lists no shards: run the same harvest again")
        for entry in manifest.shards:
            manifest._check(entry)
        return manifest

    def _check(self, entry: ShardEntry) -> None:
        if entry.split not in SPLITS:
            raise SmartKVError(
                f"{self.folder / MANIFEST} is damaged: shard {entry.file!r} has the split {entry.split!r}, "
                f"expected one of {', '.join(SPLITS)}; run the same harvest again"
            )
        path = self.folder / entry.file
        if Path(entry.file).name != entry.file:
            raise SmartKVError(f"{self.folder / MANIFEST} lists '{entry.file}', which is not a file name in its folder")
        if not path.is_file():
            raise SmartKVError(f"{path} is missing, but the manifest lists it: run the same harvest again")
        if (size := path.stat().st_size) != entry.bytes:
            raise SmartKVError(
                f"{path} is damaged: {size} bytes, the manifest says {entry.bytes}; "
                "run the same harvest again, it writes that file anew"
            )
        fingerprint, tokens = self.fingerprint, self.window * entry.windows
        header = shard_header(fingerprint, self.spec, self.window, self.sinks)
        file_header = {"sinks": self.sinks} | read_header(path)
        compared: dict[str, tuple[Any, Any]] = {name: (file_header.get(name), value) for name, value in header.items()}
        with open_tensors(path) as file:
            names = set(file.keys())
            shape = list(file.get_slice("keys").get_shape()) if "keys" in names else None
            split = int(file.get_slice("split")[0]) if "split" in names else None  # the same for all its tokens
        compared["keys of shape"] = (shape, [fingerprint.layers, fingerprint.kv_heads, tokens, fingerprint.head_dim])
        compared["tokens"], compared["split"] = (tokens, entry.tokens), (split, SPLITS.index(entry.split))
        for name, (value, listed) in compared.items():
            if value != listed:
                raise SmartKVError(
                    f"{path} has {name} {value}, its manifest says {listed}: the manifest was changed, or the shard "
                    "belongs to another harvest; run the same harvest again"
                )

    def verify(self, entries: Sequence[ShardEntry]) -> None:
        """Read shards whole and compare them with their digests.

        Raises:
            SmartKVError: A shard was changed. The message names it.
        """
        for entry in entries:
            path = self.folder / entry.file
            if shard_entry(path, entry.split, entry.windows, entry.tokens).sha256 != entry.sha256:
                raise SmartKVError(
                    f"{path} is not what was harvested (its SHA-256 differs): run the same harvest again, it writes "
                    "that file anew"
                )

    @property
    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 over the digests of all shards."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.shards).encode()).hexdigest()[:16]

    def threshold_index(self, threshold: float) -> int:
        """Find the row of `lifespan` that belongs to a threshold.

        Raises:
            SmartKVError: The threshold was not harvested.
        """
        if threshold not in self.spec.thresholds:
            known = ", ".join(str(t) for t in self.spec.thresholds)
            raise SmartKVError(f"threshold {threshold} was not harvested into {self.folder}: it holds {known}")
        return self.spec.thresholds.index(threshold)

    def of_split(self, split: str) -> list[ShardEntry]:
        """List the shards of one split, in order."""
        return [entry for entry in self.shards if entry.split == split]

    def labelled(self, split: str, block: int, follow_up: int) -> list["RowBlock"]:
        """Cut the labelled keys of a split into row blocks.

        A key is labelled if its horizon is at least `follow_up` and it is not a sink.

        Args:
            split: "train", "validation" or "test".
            block: Largest number of tokens per row block.
            follow_up: Follow-up in tokens.
        """
        return [
            RowBlock(entry.file, window, start, min(start + block, window * self.window + self.window - follow_up))
            for entry in self.of_split(split)
            for window in range(entry.windows)
            for start in range(window * self.window + self.sinks, window * self.window + self.window - follow_up, block)
        ]


@dataclass(frozen=True)
class RowBlock:
    """A slice of a shard: consecutive tokens of one window, read at once.

    Attributes:
        file: Name of the shard's file.
        window: Index of the window in the shard.
        start: Index in the shard of the first token.
        stop: Index in the shard after the last token.
    """

    file: str
    window: int
    start: int
    stop: int


def shard_entry(path: Path, split: str, windows: int, tokens: int) -> ShardEntry:
    """Make the manifest's entry for a written shard."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(path.name, split, windows, tokens, path.stat().st_size, digest)


def recorded_shards(folder: Path) -> dict[str, ShardEntry]:
    """Read the entries of a manifest by file name, without any check.

    Returns:
        An empty dictionary if `folder` has no manifest that can be read.
    """
    try:
        lines = json.loads((folder / MANIFEST).read_text())["shards"]
        return {entry.file: entry for entry in (read_dataclass(ShardEntry, line) for line in lines)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def heads_of(fingerprint: Fingerprint) -> Iterable[tuple[int, int]]:
    """Yield the (layer, head) pair of every KV head, in the order of the gates."""
    return ((layer, head) for layer in range(fingerprint.layers) for head in range(fingerprint.kv_heads))
