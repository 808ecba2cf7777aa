"""Memory figures of a LifespanCache: keys and bytes, by layer and by head."""

import torch
from torch import Tensor

from smartkv.cache.layer import LifespanLayer
from smartkv.errors import SmartKVError


class CacheUsage:
    """Mixin with figures about the layers in `storage`.

    Attributes:
        storage: one entry per layer of the model.
        first_query: position of the first query that `footprint` counts.
        moving_peak_bytes: the most bytes of all layers together while one of them moved keys.
    """

    storage: list[LifespanLayer]
    first_query: int
    moving_peak_bytes: int = 0

    @property
    def storage_bytes(self) -> int:
        """Bytes that all layers hold now: keys, values, spare and dead slots, positions, expiries, tables."""
        return sum(layer.storage_bytes for layer in self.storage)

    @property
    def exact_bytes(self) -> int:
        """Bytes of the keys and values that are stored in the model's dtype."""
        return sum(layer.exact_bytes for layer in self.storage)

    @property
    def bytes_by_layer(self) -> Tensor:
        """`storage_bytes` of each layer, int64 `[layers]`."""
        return torch.tensor([layer.storage_bytes for layer in self.storage])

    @property
    def peak_bytes(self) -> int:
        """The most bytes of all layers together so far, temporary copies of keys that were moved included."""
        return max(self.moving_peak_bytes, self.storage_bytes)

    def note_peak(self, layer: LifespanLayer) -> None:
        """Record how many bytes all layers held together while `layer` moved its keys just now."""
        others = sum(each.cached_storage_bytes for each in self.storage if each is not layer)
        self.moving_peak_bytes = max(self.moving_peak_bytes, others + layer.call_peak_bytes)

    @property
    def live_keys(self) -> Tensor:
        """Number of live keys, int64 `[layers, batch, kv_heads]` on the CPU.

        Raises:
            SmartKVError: the cache has not seen a token yet.
        """
        self._check_used()
        return torch.stack([layer.live.cpu() for layer in self.storage])

    @property
    def slots(self) -> Tensor:
        """Number of allocated slots, dead and spare ones included, int64 `[layers, batch, kv_heads]` on the CPU.

        Raises:
            SmartKVError: the cache has not seen a token yet.
        """
        self._check_used()
        return torch.stack([layer.slots.cpu() for layer in self.storage])

    @property
    def live_bytes(self) -> int:
        """Bytes of the live keys and values alone, the least that any cache with these keys needs.

        Raises:
            SmartKVError: the cache has not seen a token yet.
        """
        width = sum(t.shape[-1] * t.element_size() for t in self.storage[0].store.fields[:2])
        return int(self.live_keys.sum()) * width

    @property
    def footprint_by_head(self) -> Tensor:
        """Share of a full cache's keys that the counted queries saw, float64 `[layers, kv_heads]`.

        Raises:
            SmartKVError: the cache has seen no counted query yet.
        """
        self._check_used()
        counted = [layer.counted() for layer in self.storage]
        if not int(counted[0].full.sum()):
            raise SmartKVError(
                f"the cache has seen no query from position {self.first_query} on: there is no footprint"
            )
        return torch.stack([(count.visible.sum(0).double() / count.full.sum()).cpu() for count in counted])

    @property
    def footprint(self) -> float:
        """Share of a full cache's keys that the counted queries saw, over all KV heads.

        A full cache of a model whose layers slide holds no more than their windows there.

        Raises:
            SmartKVError: the cache has seen no counted query yet.
        """
        share, full = self.footprint_by_head, torch.stack([layer.counted().full.sum().cpu() for layer in self.storage])
        return float((share.mean(dim=1) * full).sum() / full.sum())

    def _check_used(self) -> None:
        if not all(layer.is_initialized for layer in self.storage):
            raise SmartKVError("the cache has not seen a token yet")
