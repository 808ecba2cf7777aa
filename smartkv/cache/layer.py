"""Per-layer state of a LifespanCache: when its keys are judged, freed and packed.

A layer knows when its keys must be judged, and asks the cache that it belongs to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from smartkv.cache.key_storage import KeyStorage
from smartkv.cache.model_patch import EvictionStep
from smartkv.cache.ragged import Fields
from smartkv.errors import SmartKVError
from smartkv.policies.lifetimes import FOREVER, HOLE

Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Decides about new keys, from the keys before the rotary embedding `[batch, kv_heads, tokens, head_dim]` and the
positions int64 `[batch, tokens]`: the first position whose query does not see each key, int64 `[batch, kv_heads,
tokens]`, and where a cap is shared by heads the key's score, float32 of the same shape."""


class LifespanLayer(KeyStorage, CacheLayerMixin):
    """One layer of a LifespanCache. Single tokens wait unjudged until room is made for more; the tokens of a chunk are
    judged at once."""

    is_sliding = False

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def attend(self, step: EvictionStep, judge: Judge) -> Tensor:
        """Take in the tokens of a forward pass; their attention, `[batch, query_heads, tokens, head_dim]`.

        Raises:
            SmartKVError: another number of rows, or another dtype, than what the layer holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(step.key, step.value)
            self.set_sliding_window(step.sliding_window or FOREVER)
        if len(self.seen) != len(step.key) or self.dtype != step.key.dtype:
            raise SmartKVError(
                f"the cache holds {len(self.seen)} rows in {self.dtype}, "
                f"the model was given {len(step.key)} rows and computes in {step.key.dtype}"
            )
        self.at_work, tokens = 0, step.key.shape[2]
        if tokens == 1 and step.real is None:
            if not self.ready:
                self.settle(judge, pack=True)
            self.unjudged.append(step.pre_rope)
            return self.step(step.query, step.key, step.value, step.scaling)
        self.settle(judge)
        settling = self.at_work
        real = step.real if step.real is not None else step.key.new_ones(len(step.key), tokens, dtype=torch.bool)
        position = self.seen[:, None] + real.cumsum(dim=1) - 1
        expiry, score = judge(step.pre_rope, position)
        position = position.masked_fill(~real, HOLE)[:, None].expand(expiry.shape)
        new = Fields(step.key, step.value, position.int(), expiry.int(), score).map(lambda tensor: tensor.flatten(0, 1))
        output = self.chunk(step.query, new, step.real, step.scaling)
        self.at_work = max(self.at_work, settling)
        return output

    def settle(self, judge: Judge, pack: bool = False) -> None:
        """Judge the single tokens that came since keys were packed, and free what died.

        Args:
            judge: decides about these tokens.
            pack: make room for single tokens; else keep the live keys and nothing beside them.
        """
        if not self.is_initialized or (self.settled and not pack):
            return
        expiry = score = None
        if self.pending:
            keys = torch.cat(self.unjudged, dim=2)
            expiry, score = judge(keys, self.seen[:, None] + torch.arange(self.pending, device=keys.device))
        self.free_dead(expiry, score, pack)

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Nothing is stored here: the attention function does."""
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        """Logical length: tokens so far, freed ones and padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, offset) of a mask; none is built."""
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # 5.2 hands the positions
        return self.columns + tokens, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.2
