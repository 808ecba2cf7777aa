"""LifespanCache: a KV cache that frees each key when its time to live is up.

    cache = LifespanCache(model, "smollm2-135m-instruct", footprint=0.25)
    model.generate(**inputs, past_key_values=cache)

Gates decide the time to live (TTL) of new keys. Queries attend to the keys that are visible to them. Keys that no later
query can see are freed: after every 256 tokens of a prompt, and every few tokens while decoding.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.arguments import resolve_arguments
from smartkv.cache.attached import AttachedCache
from smartkv.cache.forward_pass import EvictionStep
from smartkv.cache.layer import Judge, LifespanLayer
from smartkv.cache.linear_layers import select_states
from smartkv.cache.usage import CacheUsage
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.policies.arguments import check_first_query
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.lifetimes import FOREVER
from smartkv.quantization.per_token import Bits

F = TypeVar("F", bound=Callable[..., Any])


def _outside_autograd(function: F) -> F:
    """Run a cache's method alone, without gradients, on tensors that may be changed later outside `inference_mode`."""

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.in_use(), torch.inference_mode(False), torch.no_grad():
            return function(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class LifespanCache(CacheUsage, AttachedCache):
    """A KV cache with eviction for `model(...)` and `model.generate(...)`.

    The cache replaces the forward of the model's decoder for as long as it lives. `detach()` restores the model at
    once, and `with cache:` at the end of the block. A call without such a cache computes what it always did.

    Args:
        model: a loaded causal LM of a supported family.
        gates: a GateBank of this model on its device; or a name of `pretrained_gates()`, a folder or a hub id, from
            which gates are loaded onto the model's device; None for a policy that needs none.
        policy: what each layer keeps, with nothing left open: a HybridPolicy, the name of a policy, or a YAML file (see
            `read_policy`); None: `footprint` decides.
        chunk: number of prompt tokens that go through the model together. Each layer frees its dead keys after every
            256 of them. No logit depends on it beyond rounding.
        first_query: position of the first query that the attribute `footprint` counts.
        bits: packs keys and values in 2 to 8 bits a number; two figures such as (6, 4) are for keys and for values (see
            `smartkv.quantization.per_token`). None: they stay in the model's dtype. With bits, logits depend within the
            error of quantisation on how many tokens the first call has, up to `chunk`: the mean key that is subtracted
            before packing is theirs.
        footprint: share of the full cache's keys to keep, above 0 and at most 1, by the prices that the gates remember
            (see `policy_of`); None: the policy decides.

    Raises:
        FootprintOutOfReach: the gates remember no price for this footprint.
        SmartKVError: an argument of a wrong type; model, gates and policy that do not fit together; neither or both of
            policy and footprint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: GateBank | str | Path | None = None,
        policy: HybridPolicy | str | Path | None = None,
        chunk: int = 1024,
        first_query: int = 0,
        bits: Bits | None = None,
        *,
        footprint: float | None = None,
    ) -> None:
        architecture, self.gates, self.policy = resolve_arguments(model, gates, policy, footprint)
        self.rules = self.policy.rules_for(architecture.layers, architecture.sliding_windows)
        self.first_query, self.bits = check_first_query(first_query), bits
        self.storage = [
            LifespanLayer(cap.window if cap else rule.window or FOREVER, cap, first_query, bits)
            for rule, cap in zip(self.rules, self.policy.caps(architecture), strict=True)
        ]
        self._scored: tuple[int, Tensor, Tensor | None] | None = None
        super().__init__(model, list(self.storage), chunk)

    # -- the rule -----------------------------------------------------------------------------------------------------

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor | int:
        """Return the TTL of new keys, in tokens. A subclass with another rule overrides this method.

        Args:
            layer: index of the layer.
            keys: pre-RoPE, `[batch, kv_heads, tokens, head_dim]`.
            position: int64 `[batch, tokens]`, each token's index among the real tokens of its row.

        Returns:
            int64 `[batch, kv_heads, tokens]` from 0 to `FOREVER`, or one int for all keys. The layer's window is not
            included.
        """
        rule = self.rules[layer]
        if rule.rule != "gated" or self.gates is None:
            return self.policy.times_to_live(rule, None)
        return self.policy.times_to_live(rule, self._scores_once(layer, keys), self.gates.ages)

    def scores(self, layer: int, keys: Tensor) -> Tensor | None:
        """Return the scores that the layer's gates give new keys (see `GateBank.score`).

        Args:
            layer: index of the layer.
            keys: pre-RoPE, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            float32 `[batch, kv_heads, tokens]`, or `[…, ages]`; None if the layer has no gates.
        """
        if self.gates is None or layer not in self.gates.layers:
            return None
        return self.gates.score(layer, keys)

    def expiry(self, layer: int, keys: Tensor, position: Tensor, sliding_window: int | None) -> Tensor:
        """Return the first position whose query does not see each new key.

        Args:
            layer, keys, position: as in `times_to_live`.
            sliding_window: of the model itself, which hides sinks too; None: it has none.

        Returns:
            int64 `[batch, kv_heads, tokens]`.
        """
        ttl, born = self.times_to_live(layer, keys, position), position[:, None]
        lifetime = self.policy.lifetime(self.rules[layer], ttl, born)
        if sliding_window is not None:
            lifetime = lifetime.clamp(max=sliding_window)
        return (born + lifetime).clamp(max=FOREVER).expand(keys.shape[:3])

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Store the tokens of a forward pass in one layer, and compute their attention without gradients.

        Returns:
            `[batch, query_heads, tokens, head_dim]`, zeros for padding.

        Raises:
            SmartKVError: another number of rows, or another dtype, than the cache holds.
        """
        storage = self.storage[layer]
        if step.real is not None:  # the layers of a model may lie on several devices
            step = step._replace(real=step.real.to(step.key.device))
        output = storage.attend(step, self._judge_of(layer))
        if storage.call_peak_bytes:
            self.note_peak(storage)
        return output

    def _judge_of(self, layer: int) -> Judge:
        """Return the function that decides about the layer's new keys."""

        def judge(keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
            storage = self.storage[layer]
            limit = None if storage.sliding_window == FOREVER else storage.sliding_window
            try:
                expiry = self.expiry(layer, keys, position, limit)
                return expiry, self._rank(layer, keys, expiry.shape) if storage.ranked else None
            finally:
                self._scored = None

        return judge

    def _rank(self, layer: int, keys: Tensor, shape: torch.Size) -> Tensor:
        """Return the scores that break ties among the heads of a layer that share a cap, float32 of that shape."""
        score = self._scores_once(layer, keys)
        if score is None:
            return torch.zeros(shape, device=keys.device)
        return score if self.gates is None else self.gates.single_score(score)

    def _scores_once(self, layer: int, keys: Tensor) -> Tensor | None:
        """Return `scores`, computed once for both the TTL of the keys and their rank under a cap."""
        if self._scored is None or self._scored[0] != layer or self._scored[1] is not keys:
            self._scored = (layer, keys, self.scores(layer, keys))
        return self._scored[2]

    @_outside_autograd
    def settle(self) -> None:
        """Free the dead keys of all layers now. While decoding this happens every few tokens by itself."""
        for layer, storage in enumerate(self.storage):
            storage.call_peak_bytes = 0
            storage.settle(self._judge_of(layer))
            if storage.call_peak_bytes:
                self.note_peak(storage)

    def reset(self) -> None:
        """Forget all keys, as if the cache were new."""
        super().reset()
        self.moving_peak_bytes = 0

    # -- rows of the batch --------------------------------------------------------------------------------------------

    @_outside_autograd
    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 `[rows]`, which may repeat. A cache without tokens has no rows yet.

        Raises:
            SmartKVError: there is no such row. On a GPU nobody looks, because the GPU would have to be waited for.
        """
        if not self._rows:
            return
        if rows.device.type == "cpu" and not ((rows >= 0) & (rows < self._rows)).all():
            raise SmartKVError(f"rows must lie between 0 and {self._rows - 1}, got {rows.tolist()}")
        self.settle()
        self.seen_tokens.select(rows)
        for storage in self.storage:
            storage.select(rows.to(storage.seen.device))
            self.note_peak(storage)
        select_states(self.layers, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search goes on with, int64 `[rows]`."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch: indices int64 `[rows]`, or a mask bool `[batch]`.

        Raises:
            SmartKVError: there is no such row, or the mask is not of this batch.
        """
        if self._rows and indices.dtype == torch.bool:
            if indices.shape != (self._rows,):
                raise SmartKVError(f"a mask of rows must have shape [{self._rows}], got {list(indices.shape)}")
            indices = indices.nonzero()[:, 0]
        elif self._rows:
            indices = torch.where(indices < 0, indices + self._rows, indices)
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self.select_rows(torch.arange(self._rows).repeat_interleave(repeats))

    @property
    def _rows(self) -> int:
        return len(self.storage[0].seen) if self.storage[0].is_initialized else 0

    def crop(self, *_: Any) -> None:
        """Refuse to drop the latest tokens.

        Raises:
            SmartKVError: always, because keys that were freed cannot come back.
        """
        raise SmartKVError(
            "a LifespanCache cannot be cropped (assisted generation and prompt lookup ask for it): "
            "keys that were freed cannot come back"
        )
