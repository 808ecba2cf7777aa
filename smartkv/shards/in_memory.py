"""Labelled keys that are held in memory for a while, read like those of shards."""

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, WindowLabels
from smartkv.models.architecture import Fingerprint
from smartkv.shards.manifest import RowBlock


class InMemoryRows:
    """Blocks of windows that were just labelled; in the place of `smartkv.shards.reader.ShardReader`.

    Args:
        fingerprint: of the model that made the keys.
        spec: of their labels.
    """

    def __init__(self, fingerprint: Fingerprint, spec: LabelSpec) -> None:
        heads = (fingerprint.layers, fingerprint.kv_heads, 0)
        self._none = {
            "keys": torch.zeros(*heads, fingerprint.head_dim, dtype=torch.float16),
            "lifespan": torch.zeros(len(spec.thresholds), *heads, dtype=torch.int32),
            "future_attention": torch.zeros(len(spec.ages), *heads),
            "position": torch.zeros(0, dtype=torch.int32),
            "token": torch.zeros(0, dtype=torch.int32),
        }
        self._none["keys_post_rope"] = self._none["keys"]
        self._held: dict[tuple[str, int], tuple[RowBlock, dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._held)

    def __contains__(self, block: RowBlock) -> bool:
        """Whether this very block is held."""
        return (block.file, block.start) in self._held

    def hold(self, blocks: list[RowBlock], labels: WindowLabels, tokens: Tensor) -> None:
        """Copy these blocks of one window; the rest of it is not kept.

        Args:
            blocks: of this window, which is alone in its file.
            tokens: its ids, `[tokens]`.
        """
        for block in blocks:
            here = slice(block.start, block.stop)
            kept = {
                "keys": labels.keys[:, :, here],
                "lifespan": labels.lifespan[..., here],
                "position": torch.arange(block.start, block.stop, dtype=torch.int32),
                "token": tokens[here].int(),
            }
            if labels.keys_post_rope is not None:
                kept["keys_post_rope"] = labels.keys_post_rope[:, :, here]
            if labels.future_attention is not None:
                kept["future_attention"] = labels.future_attention[..., here]
            self._held[block.file, block.start] = block, {name: tensor.clone() for name, tensor in kept.items()}

    def drop(self, block: RowBlock) -> None:
        """Let a block go."""
        del self._held[block.file, block.start]

    def read(self, block: RowBlock, name: str, layers: list[int] | None = None) -> Tensor:
        """One tensor of one block, or of a part of one that is held; shapes as `ShardReader.read`.

        Raises:
            SmartKVError: it is not held, or lacks this tensor.
        """
        data = self._find(block, name)
        if layers is None:
            return data
        if name.startswith("keys"):
            return data[layers]
        return data[:, layers] if name in ("lifespan", "future_attention") else data

    def _find(self, block: RowBlock, name: str) -> Tensor:
        if block.start == block.stop:
            return self._none[name]
        holder, tensors = self._held.get((block.file, block.start), (None, {}))
        if holder is None or holder.stop < block.stop:
            for candidate, its in self._held.values():
                if candidate.file == block.file and candidate.start <= block.start and block.stop <= candidate.stop:
                    holder, tensors = candidate, its
        if holder is None or name not in tensors:
            raise SmartKVError(f"{block.file} [{block.start}, {block.stop}) has no '{name}' in memory")
        dim = 2 if name.startswith("keys") else tensors[name].dim() - 1
        return tensors[name].narrow(dim, block.start - holder.start, block.stop - block.start)
