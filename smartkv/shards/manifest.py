"""Shards: keys and labels on disk, and the manifest that lists them.

A shard is one safetensors file for a run of whole windows, all heads together:

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

Every file is written under a temporary name, synced and renamed: a file that is there is whole, and its header holds a
digest of its content (`smartkv.shards.shard_file`). The manifest is written last. Nothing here is ever unpickled.
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
    """What every shard says of itself, as JSON gives it back. (Those of earlier versions do not say their sinks.)"""
    labels = {"thresholds": list(spec.thresholds), "ages": list(spec.ages), "follow_up": spec.follow_up}
    cut = {"window": window, "sinks": sinks}
    return {"format_version": FORMAT_VERSION, "fingerprint": asdict(fingerprint), **labels, **cut}


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest. `windows` and `tokens` are counts, `bytes` the file's size."""

    file: str
    split: str
    windows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        folder: where it was read from.
        fingerprint: of the model that made the keys.
        spec: thresholds, ages and follow-up of the labels.
        window: tokens a window.
        sinks: tokens at the start of each window that are left out of training and scoring.
        sources: for each text source its name, origin ("local", "hub", "builtin"), windows and documents by split.
        documents: ids, in the order that the shards' `document` counts.
        arguments: of the harvest, model name and versions included.
        shards: in order.
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

    def write(self) -> None:
        """Write `manifest.json`; the last thing that a harvest does."""
        data = {"format_version": FORMAT_VERSION, **asdict(self)}
        del data["folder"]
        write_atomically(self.folder / MANIFEST, json.dumps(data, indent=1, sort_keys=True).encode())

    @classmethod
    def read(cls, folder: Path | str) -> "Manifest":
        """Read a folder's manifest and check that every shard it lists is there with its size.

        Raises:
            SmartKVError: naming the file that is missing, truncated, foreign, or outside the folder.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise SmartKVError(
                f"{path} is missing: '{folder}' is no folder of shards, or its harvest has not finished "
                "(run the same harvest command again, it goes on where it stopped)"
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
            raise SmartKVError(f"{self.folder / MANIFEST} is damaged: shard {entry.file!r} of split {entry.split!r}")
        path = self.folder / entry.file
        if Path(entry.file).name != entry.file:
            raise SmartKVError(f"{self.folder / MANIFEST} lists '{entry.file}', which is not a file name in its folder")
        if not path.is_file():
            raise SmartKVError(f"{path} is missing, but the manifest lists it: run the same harvest again")
        if (size := path.stat().st_size) != entry.bytes:
            raise SmartKVError(
                f"{path} is damaged: {size} bytes, the manifest says {entry.bytes}; "
                "run the same harvest again, it makes that file anew"
            )
        fingerprint, tokens = self.fingerprint, self.window * entry.windows
        header = shard_header(fingerprint, self.spec, self.window, self.sinks)
        there = {"sinks": self.sinks} | read_header(path)
        said: dict[str, tuple[Any, Any]] = {name: (there.get(name), value) for name, value in header.items()}
        with open_tensors(path) as file:
            held = set(file.keys())
            shape = list(file.get_slice("keys").get_shape()) if "keys" in held else None
            split = int(file.get_slice("split")[0]) if "split" in held else None  # a shard has one
        said["keys of shape"] = (shape, [fingerprint.layers, fingerprint.kv_heads, tokens, fingerprint.head_dim])
        said["tokens"], said["split"] = (tokens, entry.tokens), (split, SPLITS.index(entry.split))
        for name, (ours, listed) in said.items():
            if ours != listed:
                raise SmartKVError(
                    f"{path} has {name} {ours}, its manifest says {listed}: the manifest was changed, or the shard is "
                    "another's; run the same harvest again"
                )

    def verify(self, entries: Sequence[ShardEntry]) -> None:
        """Read these shards whole, and compare them with what was written.

        Raises:
            SmartKVError: naming the shard that is another.
        """
        for entry in entries:
            path = self.folder / entry.file
            if shard_entry(path, entry.split, entry.windows, entry.tokens).sha256 != entry.sha256:
                raise SmartKVError(
                    f"{path} is not what was harvested (its SHA-256 differs): run the same harvest again, it makes "
                    "that file anew"
                )

    @property
    def digest(self) -> str:
        """Of what all shards hold."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.shards).encode()).hexdigest()[:16]

    def threshold_index(self, threshold: float) -> int:
        """Which row of `lifespan` belongs to `threshold`.

        Raises:
            SmartKVError: it was not harvested.
        """
        if threshold not in self.spec.thresholds:
            known = ", ".join(str(t) for t in self.spec.thresholds)
            raise SmartKVError(f"threshold {threshold} was not harvested into {self.folder}: it holds {known}")
        return self.spec.thresholds.index(threshold)

    def of_split(self, split: str) -> list[ShardEntry]:
        """The shards of one split, in order."""
        return [entry for entry in self.shards if entry.split == split]

    def labelled(self, split: str, block: int, follow_up: int) -> list["RowBlock"]:
        """The keys with horizon ≥ `follow_up` that are no sinks, cut into blocks of at most `block` tokens."""
        return [
            RowBlock(entry.file, window, start, min(start + block, window * self.window + self.window - follow_up))
            for entry in self.of_split(split)
            for window in range(entry.windows)
            for start in range(window * self.window + self.sinks, window * self.window + self.window - follow_up, block)
        ]


@dataclass(frozen=True)
class RowBlock:
    """Consecutive tokens `[start, stop)` of one window of one shard; what is read from disk at once."""

    file: str
    window: int
    start: int
    stop: int


def shard_entry(path: Path, split: str, windows: int, tokens: int) -> ShardEntry:
    """The manifest's line for a written shard."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(path.name, split, windows, tokens, path.stat().st_size, digest)


def recorded_shards(folder: Path) -> dict[str, ShardEntry]:
    """What a manifest in `folder` says of each shard, by file name; nothing if there is none that can be read."""
    try:
        lines = json.loads((folder / MANIFEST).read_text())["shards"]
        return {entry.file: entry for entry in (read_dataclass(ShardEntry, line) for line in lines)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def heads_of(fingerprint: Fingerprint) -> Iterable[tuple[int, int]]:
    """(layer, head) of every KV head, in the order of the gates."""
    return ((layer, head) for layer in range(fingerprint.layers) for head in range(fingerprint.kv_heads))
