"""What a LifespanCache holds, in keys and in bytes, by layer and by head."""

import torch
from torch import Tensor

from smartkv.cache.layer import LifespanLayer
from smartkv.errors import SmartKVError


class CacheUsage:
    """Figures of the layers in `storage`.

    Attributes:
        storage: one a layer of the model.
        first_query: position of the first query that `footprint` counts.
        fullest: largest sum of storage while a layer moved keys.
    """

    storage: list[LifespanLayer]
    first_query: int
    fullest: int = 0

    @property
    def storage_bytes(self) -> int:
        """Bytes that all layers hold now: keys, values, holes, positions, expiries, tables."""
        return sum(layer.storage_bytes for layer in self.storage)

    @property
    def exact_bytes(self) -> int:
        """Those of keys and values that are held in the model's dtype."""
        return sum(layer.exact_bytes for layer in self.storage)

    @property
    def bytes_by_layer(self) -> Tensor:
        """The same by layer, int64 `[layers]`."""
        return torch.tensor([layer.storage_bytes for layer in self.storage])

    @property
    def peak_bytes(self) -> int:
        """Largest sum of storage so far, what was held while keys were moved included."""
        return max(self.fullest, self.storage_bytes)

    def note_peak(self, layer: LifespanLayer) -> None:
        """Remember how much all layers held while this one moved its keys, just now."""
        others = sum(each.bytes_since_moved for each in self.storage if each is not layer)
        self.fullest = max(self.fullest, others + layer.at_work)

    @property
    def live_keys(self) -> Tensor:
        """Keys that are not expired, int64 `[layers, batch, kv_heads]`, on the CPU.

        Raises:
            SmartKVError: no token has been seen.
        """
        self._check_used()
        return torch.stack([layer.live.cpu() for layer in self.storage])

    @property
    def slots(self) -> Tensor:
        """Places for a key that are allocated, those of dead keys and of tokens to come included; as `live_keys`."""
        self._check_used()
        return torch.stack([layer.slots.cpu() for layer in self.storage])

    @property
    def live_bytes(self) -> int:
        """Bytes of the live keys and values alone: what no cache could do without. Raises as `live_keys`."""
        width = sum(t.shape[-1] * t.element_size() for t in self.storage[0].store.fields[:2])
        return int(self.live_keys.sum()) * width

    @property
    def footprint_by_head(self) -> Tensor:
        """Share of a full cache's keys that the counted queries saw, float64 `[layers, kv_heads]`.

        Raises:
            SmartKVError: no query was counted.
        """
        self._check_used()
        counted = [layer.counted() for layer in self.storage]
        if not int(counted[0].full.sum()):
            raise SmartKVError(f"no query from position {self.first_query} on was seen: there is no footprint")
        return torch.stack([(count.visible.sum(0).double() / count.full.sum()).cpu() for count in counted])

    @property
    def footprint(self) -> float:
        """Σ keys seen ÷ Σ keys of a full cache, over KV heads and the counted queries. Raises as above."""
        return float(self.footprint_by_head.mean())

    def _check_used(self) -> None:
        if not all(layer.is_initialized for layer in self.storage):
            raise SmartKVError("the cache has not seen a token yet")
