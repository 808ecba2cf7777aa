"""Memory-mapped reading of shards."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import RowBlock
from smartkv.shards.shard_file import open_tensors


class ShardReader:
    """Reads blocks out of shards by memory map; holds no data. Files are opened when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._mapped: dict[tuple[str, str], Tensor] = {}

    def read(self, block: RowBlock, name: str, layers: list[int] | None = None) -> Tensor:
        """One tensor of one block, all layers or some.

        Returns:
            `[layers, kv_heads, tokens, head_dim]` for keys, `[thresholds or ages, layers, kv_heads, tokens]` for
            labels, `[tokens]` for the rest, in the dtype on disk. A view of the map: not to be written to.

        Raises:
            SmartKVError: the file is damaged or lacks this tensor.
        """
        here = slice(block.start, block.stop)
        try:
            tensor = self._tensor(block.file, name)
            if name.startswith("keys"):
                data = tensor[:, :, here]
                return data if layers is None else data[layers]
            if name in ("lifespan", "future_attention"):
                data = tensor[:, :, :, here]
                return data if layers is None else data[:, layers]
            return tensor[here]
        except (SafetensorError, IndexError) as error:
            raise SmartKVError(f"{self.folder / block.file} has no usable '{name}': {error}") from error

    def _tensor(self, file: str, name: str) -> Tensor:
        """All of it, mapped: asked for once, as finding it in its file takes longer than reading a block."""
        if (file, name) not in self._mapped:
            if file not in self._open:
                self._open[file] = open_tensors(self.folder / file)
            self._mapped[file, name] = self._open[file].get_tensor(name)
        return self._mapped[file, name]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_open": {}, "_mapped": {}}  # maps do not travel to worker processes
