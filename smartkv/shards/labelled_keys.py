"""The labelled keys of shards, on which gates are trained and scored, with their targets."""

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.io.checks import all_finite
from smartkv.labels.key_labels import Labels
from smartkv.labels.lifespans import log4_lifespan
from smartkv.models.architecture import gated_layers
from smartkv.models.layer_ranges import parse_layers
from smartkv.shards.in_memory import InMemoryRows
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.shards.reader import ShardReader

INPUTS = ("keys", "keys_post_rope")


class LabelledKeys:
    """The labelled keys of some or all layers of shards, for one threshold.

    A key is labelled if at least `follow_up` later queries of its window were seen and it is not a sink. A row is one
    token of a row block; it has a key and labels in every head.

    Args:
        manifest: Manifest of the shards.
        threshold: Attention probability that counts as a hit; one of those harvested.
        follow_up: Follow-up in tokens, at which lifespans are capped. None means that of the harvest.
        inputs: What gates read: "keys" (before the rotary embedding) or "keys_post_rope".
        layers: Ranges of layers such as "0-2,20-29". None means all; of a model of which some layers slide, those that
            see everything.
        reader: Source of the keys and labels. None means the manifest's folder.

    Raises:
        SmartKVError: The shards lack the threshold, layers or inputs, or the follow-up leaves no key.
    """

    def __init__(
        self,
        manifest: Manifest,
        threshold: float = 0.05,
        follow_up: int | None = None,
        inputs: str = "keys",
        layers: str | None = None,
        reader: InMemoryRows | None = None,
    ) -> None:
        if inputs not in INPUTS:
            raise SmartKVError(f"inputs '{inputs}' is unknown: expected {' or '.join(INPUTS)}")
        self.manifest, self.threshold, self.inputs = manifest, threshold, inputs
        self.follow_up = manifest.spec.follow_up if follow_up is None else follow_up
        if not 1 <= self.follow_up < manifest.window - manifest.sinks:
            raise SmartKVError(
                f"follow_up {self.follow_up} leaves no key of a window of {manifest.window} tokens: "
                f"choose less than {manifest.window - manifest.sinks}"
            )
        total = manifest.fingerprint.layers
        self.layers = parse_layers(layers, total) if layers else gated_layers(total, manifest.sliding_windows)
        self.gates = len(self.layers) * manifest.fingerprint.kv_heads
        self._threshold_row = manifest.threshold_index(threshold)
        self._layers = None if len(self.layers) == manifest.fingerprint.layers else self.layers
        self._reader = ShardReader(manifest.folder) if reader is None else reader

    def blocks(self, split: str, size: int | None = None) -> list[RowBlock]:
        """List the row blocks of a split.

        Args:
            split: "train", "validation" or "test".
            size: Largest number of tokens per row block. None means one row block per window.

        Raises:
            SmartKVError: The shards have no window of this split.
        """
        if not self.manifest.of_split(split):
            raise SmartKVError(f"{self.manifest.folder} has no {split} windows: harvest some")
        return self.manifest.labelled(split, size or self.manifest.window, self.follow_up)

    def keys(self, *blocks: RowBlock) -> Tensor:
        """Copy the keys of one or more row blocks, concatenated: float16 `[gates, rows, head_dim]`."""
        return torch.cat([self._reader.read(block, self.inputs, self._layers) for block in blocks], dim=2).flatten(0, 1)

    def checked_keys(self, block: RowBlock) -> Tensor:
        """Copy the keys of a row block and check that they are finite: float16 `[gates, rows, head_dim]`.

        Raises:
            SmartKVError: A key is NaN or infinite. The message names the file.
        """
        keys = self.keys(block)
        if not all_finite(keys):
            raise SmartKVError(
                f"{self.manifest.folder / block.file} holds {self.inputs} that are NaN or infinite: "
                "delete it and run the same harvest again"
            )
        return keys

    def target(self, *blocks: RowBlock) -> Tensor:
        """Compute the log4 lifespans, capped at the follow-up: float32 `[gates, rows]`."""
        lifespans = [self._reader.read(block, "lifespan", self._layers)[self._threshold_row] for block in blocks]
        return log4_lifespan(torch.cat(lifespans, dim=2).flatten(0, 1), self.follow_up)

    def labels(self, *blocks: RowBlock) -> Labels:
        """Read all labels that objectives use."""
        ages = self.manifest.spec.ages
        if not ages:
            return Labels(self.target(*blocks))
        future = torch.cat([self._reader.read(block, "future_attention", self._layers) for block in blocks], dim=3)
        return Labels(self.target(*blocks), future.flatten(1, 2), ages)

    def position(self, *blocks: RowBlock) -> Tensor:
        """Read each row's position in its window, int32 `[rows]`."""
        return torch.cat([self._reader.read(block, "position") for block in blocks], dim=0)

    def token(self, *blocks: RowBlock) -> Tensor:
        """Read the token ids, int32 `[rows]`."""
        return torch.cat([self._reader.read(block, "token") for block in blocks], dim=0)

    def document(self, block: RowBlock) -> Tensor:
        """Read each row's index into the manifest's `documents`, int32 `[rows]`."""
        return self._reader.read(block, "document").clone()
