"""LifespanLayer: the state of one layer of a LifespanCache, and when its keys are judged and freed.

The life of a key has four steps. It is stored when its token comes. It is *judged* once: its expiry is decided. It is
hidden from the queries at and after its expiry. It is freed when its layer next packs its keys.

The tokens of a chunk are judged at once. Single tokens, and those of a short call such as a drafted continuation, stay
*pending* until the spare slots are used up, and are then judged together. No logit depends on that, because every key
is visible for `min_lifetime` tokens and no more tokens than that are pending.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from smartkv.cache.forward_pass import EvictionStep
from smartkv.cache.key_edits import EditableKeys
from smartkv.cache.paged import LEAST_SPARE
from smartkv.cache.ragged import Fields
from smartkv.errors import SmartKVError
from smartkv.policies.lifetimes import FOREVER, HOLE

Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Function that decides how long new keys stay.

Args: pre-RoPE keys `[batch, kv_heads, tokens, head_dim]`, and positions int64 `[batch, tokens]`.
Returns: the first position whose query does not see each key, int64 `[batch, kv_heads, tokens]`; and each key's score,
float32 of the same shape, if the layer is `ranked`, else None.
"""


class LifespanLayer(EditableKeys, CacheLayerMixin):
    """One layer of a LifespanCache. It owns its keys and their state; the cache gives it a `Judge`."""

    is_sliding = False
    is_croppable = True  # transformers 5.24 asks

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def attend(self, step: EvictionStep, judge: Judge) -> Tensor:
        """Store the tokens of a forward pass, and compute their attention.

        Args:
            step: the layer's inputs.
            judge: decides about the keys whose turn it is.

        Returns:
            `[batch, query_heads, tokens, head_dim]`, zeros for padding.

        Raises:
            SmartKVError: another number of rows, or another dtype, than the layer holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(step.key, step.value)
            self.set_sliding_window(step.sliding_window or FOREVER)
        if len(self.seen) != len(step.key) or self.dtype != step.key.dtype:
            raise SmartKVError(
                f"the cache holds {len(self.seen)} rows in {self.dtype}, "
                f"the model was given {len(step.key)} rows and computes in {step.key.dtype}"
            )
        self.call_peak_bytes, tokens = 0, step.key.shape[2]
        few = tokens == 1 or (self.columns > 0 and tokens <= min(LEAST_SPARE, self.min_lifetime))
        if few and step.real is None:
            if tokens > self.spare_slots:
                self.settle(judge, pack=True)
            self.pending_keys.append(step.pre_rope)
            return self.step(step.query, step.key, step.value, step.softmax)
        self.settle(judge)
        settling_peak_bytes = self.call_peak_bytes
        real = step.real if step.real is not None else step.key.new_ones(len(step.key), tokens, dtype=torch.bool)
        position = self.seen[:, None] + real.cumsum(dim=1) - 1
        expiry, score = judge(step.pre_rope, position)
        position = position.masked_fill(~real, HOLE)[:, None].expand(expiry.shape)
        new = Fields(step.key, step.value, position.int(), expiry.int(), score).map(lambda tensor: tensor.flatten(0, 1))
        output = self.chunk(step.query, new, step.real, step.softmax)
        self.call_peak_bytes = max(self.call_peak_bytes, settling_peak_bytes)
        return output

    def settle(self, judge: Judge, pack: bool = False) -> None:
        """Judge the pending tokens, and free the dead keys.

        Args:
            judge: decides about the pending tokens.
            pack: whether to pack the live keys into pages with spare slots for single tokens; else only the live keys
                are stored, without any spare slot.
        """
        if not self.is_initialized or (self.settled and not pack):
            return
        expiry = score = None
        if self.pending:
            keys = torch.cat(self.pending_keys, dim=2)
            expiry, score = judge(keys, self.seen[:, None] + torch.arange(self.pending, device=keys.device))
        self.free_dead(expiry, score, pack)

    def forget_latest(self, columns: int, tokens: Tensor, judge: Judge) -> None:
        """Forget the latest tokens.

        Args:
            columns: number of latest tokens, padding included.
            tokens: int64 `[batch]`, how many of them are real.
            judge: decides about the pending tokens.
        """
        self.call_peak_bytes = 0
        if columns <= self.pending:
            self.drop_pending(columns)
            return
        self.settle(judge)
        settling_peak_bytes = self.call_peak_bytes
        self.drop_latest(columns, tokens)
        self.call_peak_bytes = max(self.call_peak_bytes, settling_peak_bytes)

    # -- the interface of transformers' cache layers ------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the tensors as they are; `attend` stores them a moment later."""
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens so far, freed ones and padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (keys, offset) for a causal mask; the model builds none while it works on this cache."""
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # transformers 5.2: positions
        return self.columns + tokens, 0

    def get_max_length(self) -> int:
        """Return −1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.2
