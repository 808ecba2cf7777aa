"""Labelled keys kept in memory for a while and read like those of shards."""

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, WindowLabels
from smartkv.models.architecture import Fingerprint
from smartkv.shards.manifest import RowBlock


class InMemoryRows:
    """Row blocks of freshly labelled windows, kept in memory.

    It is read like a `smartkv.shards.reader.ShardReader`, so that training needs no files.

    Args:
        fingerprint: Architecture of the model that made the keys.
        spec: Thresholds, ages and follow-up of their labels.
    """

    def __init__(self, fingerprint: Fingerprint, spec: LabelSpec) -> None:
        heads = (fingerprint.layers, fingerprint.kv_heads, 0)
        self._empty = {
            "keys": torch.zeros(*heads, fingerprint.head_dim, dtype=torch.float16),
            "lifespan": torch.zeros(len(spec.thresholds), *heads, dtype=torch.int32),
            "future_attention": torch.zeros(len(spec.ages), *heads),
            "position": torch.zeros(0, dtype=torch.int32),
            "token": torch.zeros(0, dtype=torch.int32),
        }
        self._empty["keys_post_rope"] = self._empty["keys"]
        self._tensors: dict[tuple[str, int], tuple[RowBlock, dict[str, Tensor]]] = {}  # by file and first token

    def __len__(self) -> int:
        """Count the row blocks in memory."""
        return len(self._tensors)

    def __contains__(self, block: RowBlock) -> bool:
        """Say whether a row block of this file and first token is in memory."""
        return (block.file, block.start) in self._tensors

    def hold(self, blocks: list[RowBlock], labels: WindowLabels, tokens: Tensor) -> None:
        """Copy row blocks of one window; the rest of the window is not kept.

        Args:
            blocks: Row blocks of the window, which is the only one of its file.
            labels: Keys and labels of the whole window.
            tokens: Token ids of the whole window, `[tokens]`.
        """
        for block in blocks:
            rows = slice(block.start, block.stop)
            tensors = {
                "keys": labels.keys[:, :, rows],
                "lifespan": labels.lifespan[..., rows],
                "position": torch.arange(block.start, block.stop, dtype=torch.int32),
                "token": tokens[rows].int(),
            }
            if labels.keys_post_rope is not None:
                tensors["keys_post_rope"] = labels.keys_post_rope[:, :, rows]
            if labels.future_attention is not None:
                tensors["future_attention"] = labels.future_attention[..., rows]
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            self._tensors[block.file, block.start] = block, copies

    def drop(self, block: RowBlock) -> None:
        """Free a row block."""
        del self._tensors[block.file, block.start]

    def read(self, block: RowBlock, name: str, layers: list[int] | None = None) -> Tensor:
        """Read one tensor of a row block, or of a part of one.

        Args:
            block: A row block in memory, a part of one, or an empty one.
            name: Name of the tensor.
            layers: Indices of the layers to read. None means all.

        Returns:
            Shapes and dtypes as in `ShardReader.read`. It may be a view: not to be written to.

        Raises:
            SmartKVError: The row block is not in memory, or was kept without this tensor.
        """
        data = self._find(block, name)
        if layers is None:
            return data
        if name.startswith("keys"):
            return data[layers]
        return data[:, layers] if name in ("lifespan", "future_attention") else data

    def _find(self, block: RowBlock, name: str) -> Tensor:
        if block.start == block.stop:
            return self._empty[name]
        whole, tensors = self._tensors.get((block.file, block.start), (None, {}))
        if whole is None or whole.stop < block.stop:
            covering = (
                (candidate, its_tensors)
                for candidate, its_tensors in self._tensors.values()
                if candidate.file == block.file and candidate.start <= block.start and block.stop <= candidate.stop
            )
            whole, tensors = next(covering, (None, {}))
        if whole is None or name not in tensors:
            raise SmartKVError(
                f"{block.file} [{block.start}, {block.stop}) has no '{name}' in memory: hold these rows before reading"
            )
        dim = 2 if name.startswith("keys") else tensors[name].dim() - 1
        return tensors[name].narrow(dim, block.start - whole.start, block.stop - block.start)
