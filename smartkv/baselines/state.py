"""The keys of one layer that are left while a text is read, and what methods know of them."""

from typing import Literal

import torch
from torch import Tensor

from smartkv.models.rotary import Rotation

Needs = Literal["keys", "queries", "attention weights"]
LATEST = 64  # queries that are remembered for methods that look at the latest


class LiveKeys:
    """Keys that every head still has, the same number in each.

    Attributes:
        key, value: `[kv_heads, keys, head_dim]`, keys after the rotary embedding.
        position: int64 `[kv_heads, keys]`, ascending.
        accumulated: float32 `[kv_heads, keys]`, attention that each has got from all queries so far, mean over the
            head's query group; kept where a method needs attention weights.
        latest: the last queries, `[kv_heads, group, queries, head_dim]`, after the rotary embedding.
        read: tokens so far.
    """

    def __init__(self, layer: int, kv_heads: int, scaling: float, rotation: Rotation, needs: Needs) -> None:
        self.layer, self.kv_heads, self.scaling, self.rotation, self.needs = layer, kv_heads, scaling, rotation, needs
        self.key = self.value = self.position = self.latest = self.accumulated = torch.empty(0)
        self.read = 0
        self.total = self.outer = torch.empty(0)  # of the queries before the rotary embedding, and of their products

    @property
    def count(self) -> int:
        """Keys in each head."""
        return self.key.shape[1]

    def add(self, queries: Tensor, key: Tensor, value: Tensor) -> None:
        """New tokens: `queries` `[kv_heads, group, new, head_dim]`, `key` and `value` `[kv_heads, new, head_dim]`."""
        new = key.shape[1]
        position = torch.arange(self.read, self.read + new, device=key.device)
        got = torch.zeros(self.kv_heads, new, device=key.device)
        if self.read:
            self.key, self.value = torch.cat([self.key, key], dim=1), torch.cat([self.value, value], dim=1)
            self.position = torch.cat([self.position, position.expand(self.kv_heads, -1)], dim=1)
            self.accumulated = torch.cat([self.accumulated, got], dim=1)
            self.latest = torch.cat([self.latest, queries], dim=2)[:, :, -LATEST:]
        else:
            self.key, self.value, self.position = key, value, position.expand(self.kv_heads, -1)
            self.accumulated, self.latest = got, queries[:, :, -LATEST:]
            shape = (*queries.shape[:2], queries.shape[-1])
            self.total = torch.zeros(shape, device=key.device)
            self.outer = torch.zeros(*shape, shape[-1], device=key.device)
        if self.needs == "queries":
            plain = self.rotation.unrotate(queries, position)
            self.total += plain.sum(dim=2)
            self.outer += plain.mT @ plain
        self.read += new

    def attend(self, queries: Tensor, start: int, own: int | None) -> tuple[Tensor, Tensor]:
        """Attention of the newest queries over what is left.

        Args:
            queries: `[kv_heads, group, new, head_dim]`, of tokens from `start` on.
            own: the model's sliding window.

        Returns:
            Output like `queries`, and how many keys each query saw, int64 `[kv_heads, new]`.
        """
        group, new = queries.shape[1:3]
        place = torch.arange(start, start + new, device=queries.device)[:, None]
        visible = self.position[:, None] <= place
        if own is not None:
            visible &= self.position[:, None] > place - own
        weights = self._weights(queries, visible)
        if self.needs == "attention weights":
            self.accumulated += weights.sum(dim=(1, 2)) / group
        mixed = weights.to(self.value.dtype).flatten(1, 2) @ self.value
        return mixed.unflatten(1, (group, new)), visible.sum(dim=-1)

    def attention_of_latest(self, queries: int) -> Tensor:
        """Probabilities of the latest queries over what is left, float32 `[kv_heads, group, queries, keys]`."""
        latest = self.latest[:, :, -queries:]
        place = torch.arange(self.read - latest.shape[2], self.read, device=latest.device)[:, None]
        return self._weights(latest, self.position[:, None] <= place)

    def _weights(self, queries: Tensor, visible: Tensor) -> Tensor:
        scores = (queries.flatten(1, 2) @ self.key.mT).float().mul_(self.scaling).unflatten(1, queries.shape[1:3])
        return scores.masked_fill_(~visible[:, None], float("-inf")).softmax(dim=-1)

    def keep(self, index: Tensor) -> None:
        """Only these keys stay, int64 `[kv_heads, keys]`."""
        index = index.sort(dim=1).values
        each = index[..., None].expand(-1, -1, self.key.shape[-1])
        self.key, self.value = self.key.gather(1, each), self.value.gather(1, each)
        self.position, self.accumulated = self.position.gather(1, index), self.accumulated.gather(1, index)
