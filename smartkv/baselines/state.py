"""The keys of one layer that are left while a text is read, with the statistics that methods use."""

from typing import Literal

import torch
from torch import Tensor

from smartkv.models.rotary import Rotation
from smartkv.models.softmax import Softmax

Needs = Literal["keys", "queries", "attention weights"]
LATEST = 64  # queries kept for methods that use the attention of the latest ones


class LiveKeys:
    """The keys that are left in one layer, the same number in every head.

    Args:
        layer: Index of the layer.
        kv_heads: Number of KV heads.
        softmax: The step from products of queries and keys to probabilities.
        rotation: Rotary embedding of the model.
        needs: What the method needs beside keys; only these statistics are kept.

    Attributes:
        key: `[kv_heads, keys, head_dim]`, after the rotary embedding.
        value: `[kv_heads, keys, head_dim]`.
        position: int64 `[kv_heads, keys]`, ascending.
        accumulated: Attention that each key got from all queries so far, mean over the head's query group, float32
            `[kv_heads, keys]`; stays 0 unless the method needs attention weights.
        latest: The last queries after the rotary embedding, `[kv_heads, group, queries, head_dim]`.
        read: Number of tokens read so far.
        query_sum: Sum of the queries before the rotary embedding, `[kv_heads, group, head_dim]`; stays 0 unless the
            method needs queries.
        query_outer_sum: Sum of their outer products, `[kv_heads, group, head_dim, head_dim]`.
    """

    def __init__(self, layer: int, kv_heads: int, softmax: Softmax, rotation: Rotation, needs: Needs) -> None:
        self.layer, self.kv_heads, self.softmax, self.rotation, self.needs = layer, kv_heads, softmax, rotation, needs
        self.key = self.value = self.position = self.latest = self.accumulated = torch.empty(0)
        self.read = 0
        self.query_sum = self.query_outer_sum = torch.empty(0)

    @property
    def count(self) -> int:
        """The number of keys left in each head."""
        return self.key.shape[1]

    def add(self, queries: Tensor, key: Tensor, value: Tensor) -> None:
        """Add new tokens.

        Args:
            queries: `[kv_heads, group, new, head_dim]`, after the rotary embedding.
            key: `[kv_heads, new, head_dim]`, after the rotary embedding.
            value: `[kv_heads, new, head_dim]`.
        """
        new = key.shape[1]
        position = torch.arange(self.read, self.read + new, device=key.device)
        no_attention = torch.zeros(self.kv_heads, new, device=key.device)
        if self.read:
            self.key, self.value = torch.cat([self.key, key], dim=1), torch.cat([self.value, value], dim=1)
            self.position = torch.cat([self.position, position.expand(self.kv_heads, -1)], dim=1)
            self.accumulated = torch.cat([self.accumulated, no_attention], dim=1)
            self.latest = torch.cat([self.latest, queries], dim=2)[:, :, -LATEST:]
        else:
            self.key, self.value, self.position = key, value, position.expand(self.kv_heads, -1)
            self.accumulated, self.latest = no_attention, queries[:, :, -LATEST:]
            shape = (*queries.shape[:2], queries.shape[-1])
            self.query_sum = torch.zeros(shape, device=key.device)
            self.query_outer_sum = torch.zeros(*shape, shape[-1], device=key.device)
        if self.needs == "queries":
            unrotated = self.rotation.unrotate(queries, position)
            self.query_sum += unrotated.sum(dim=2)
            self.query_outer_sum += unrotated.mT @ unrotated
        self.read += new

    def attend(self, queries: Tensor, start: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        """Compute the attention of the newest queries over the keys that are left.

        Args:
            queries: `[kv_heads, group, new, head_dim]`, after the rotary embedding.
            start: Position of the first of them.
            sliding_window: Window of the model itself, in tokens. None if it has none.

        Returns:
            Output like `queries`, and the number of keys that each query saw, int64 `[kv_heads, new]`.
        """
        group, new = queries.shape[1:3]
        query_position = torch.arange(start, start + new, device=queries.device)[:, None]
        visible = self.position[:, None] <= query_position
        if sliding_window is not None:
            visible &= self.position[:, None] > query_position - sliding_window
        weights = self._weights(queries, visible)
        if self.needs == "attention weights":
            self.accumulated += weights.sum(dim=(1, 2)) / group
        mixed = weights.to(self.value.dtype).flatten(1, 2) @ self.value
        return mixed.unflatten(1, (group, new)), visible.sum(dim=-1)

    def attention_of_latest(self, queries: int) -> Tensor:
        """Compute the attention probabilities of the latest queries over the keys that are left.

        Args:
            queries: Number of queries, at most `LATEST`.

        Returns:
            float32 `[kv_heads, group, queries, keys]`.
        """
        latest = self.latest[:, :, -queries:]
        query_position = torch.arange(self.read - latest.shape[2], self.read, device=latest.device)[:, None]
        return self._weights(latest, self.position[:, None] <= query_position)

    def _weights(self, queries: Tensor, visible: Tensor) -> Tensor:
        scores = self.softmax.scores(queries.flatten(1, 2) @ self.key.mT).unflatten(1, queries.shape[1:3])
        return self.softmax.probabilities(scores.masked_fill_(~visible[:, None], float("-inf")))

    def keep(self, index: Tensor) -> None:
        """Evict all keys but these.

        Args:
            index: Indices among the keys that are left, in any order, int64 `[kv_heads, keys]`.
        """
        index = index.sort(dim=1).values
        wide_index = index[..., None].expand(-1, -1, self.key.shape[-1])
        self.key, self.value = self.key.gather(1, wide_index), self.value.gather(1, wide_index)
        self.position, self.accumulated = self.position.gather(1, index), self.accumulated.gather(1, index)
