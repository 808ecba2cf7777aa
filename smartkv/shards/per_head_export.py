"""Exports keys and targets of shards to one folder per head, for tools that read this layout."""

from pathlib import Path

import torch
from safetensors.torch import save

from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically
from smartkv.labels.lifespans import log4_lifespan
from smartkv.shards.manifest import Manifest, heads_of
from smartkv.shards.reader import ShardReader


def export_heads(manifest: Manifest, out: Path, threshold: float, split: str = "train") -> int:
    """Write the labelled keys of each head to a folder of its own, `l{layer}_h{head}/shard_{n}.safetensors`.

    Each file holds the labelled keys of one shard: `keys` float16 `[rows, head_dim]` and `target` float32 `[rows]`,
    the log4 lifespan capped at the follow-up.

    Args:
        manifest: Manifest of the shards.
        out: Folder to write to.
        threshold: Attention probability that counts as a hit; one of those harvested.
        split: "train", "validation" or "test".

    Returns:
        The number of files written.

    Raises:
        SmartKVError: No key of this split is labelled, or the threshold was not harvested.
    """
    reader, row = ShardReader(manifest.folder), manifest.threshold_index(threshold)
    if not manifest.labelled(split, manifest.window, manifest.spec.follow_up):
        raise SmartKVError(
            f"{manifest.folder} has no labelled {split} keys to export: harvest this split, or choose another"
        )
    written = 0
    for number, entry in enumerate(manifest.of_split(split)):
        labelled = manifest.labelled(split, manifest.window, manifest.spec.follow_up)
        blocks = [block for block in labelled if block.file == entry.file]
        keys = torch.cat([reader.read(block, "keys") for block in blocks], dim=2)
        lifespan = torch.cat([reader.read(block, "lifespan")[row] for block in blocks], dim=2)
        target = log4_lifespan(lifespan, manifest.spec.follow_up)
        for layer, head in heads_of(manifest.fingerprint):
            tensors = {"keys": keys[layer, head].contiguous(), "target": target[layer, head].contiguous()}
            write_atomically(out / f"l{layer}_h{head}" / f"shard_{number}.safetensors", save(tensors))
            written += 1
    return written
