"""Memory-mapped reading of shards."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import RowBlock
from smartkv.shards.shard_file import open_tensors


class ShardReader:
    """Reader of row blocks through memory maps, which copies nothing.

    A file is opened at the first read from it.

    Args:
        folder: Folder of the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._mapped: dict[tuple[str, str], Tensor] = {}

    def read(self, block: RowBlock, name: str, layers: list[int] | None = None) -> Tensor:
        """Read one tensor of a row block.

        Args:
            block: The rows to read.
            name: Name of the tensor, as listed in `smartkv.shards.manifest`.
            layers: Indices of the layers to read. None means all.

        Returns:
            `[layers, kv_heads, tokens, head_dim]` for keys, `[thresholds or ages, layers, kv_heads, tokens]` for
            labels, `[tokens]` for the rest, in the dtype on disk. It may be a view of the map: not to be written to.

        Raises:
            SmartKVError: The file is missing, damaged, or lacks this tensor.
        """
        rows = slice(block.start, block.stop)
        try:
            tensor = self._tensor(block.file, name)
            if name.startswith("keys"):
                data = tensor[:, :, rows]
                return data if layers is None else data[layers]
            if name in ("lifespan", "future_attention"):
                data = tensor[:, :, :, rows]
                return data if layers is None else data[:, layers]
            return tensor[rows]
        except (SafetensorError, IndexError) as error:
            raise SmartKVError(
                f"{self.folder / block.file} has no usable '{name}' ({error}): run the harvest again"
            ) from error

    def _tensor(self, file: str, name: str) -> Tensor:
        """Map a whole tensor once, because finding it in its file takes longer than reading a row block."""
        if (file, name) not in self._mapped:
            if file not in self._open:
                self._open[file] = open_tensors(self.folder / file)
            self._mapped[file, name] = self._open[file].get_tensor(name)
        return self._mapped[file, name]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_open": {}, "_mapped": {}}  # maps cannot be pickled for worker processes
