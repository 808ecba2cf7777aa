"""LifespanCache: a KV cache from which keys are freed when their time to live is up.

    model.generate(**inputs, past_key_values=LifespanCache(model, gates, policy))

Gates decide the TTL of new keys, queries attend to what is visible to them, and what no later query can see is freed:
after every 256 tokens of a prompt, and every few tokens while decoding.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.arguments import check_first_query, resolve_arguments
from smartkv.cache.attached import AttachedCache
from smartkv.cache.layer import Judge, LifespanLayer
from smartkv.cache.model_patch import EvictionStep
from smartkv.cache.usage import CacheUsage
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.lifetimes import FOREVER
from smartkv.quantization.per_token import Bits

F = TypeVar("F", bound=Callable[..., Any])


def _outside_autograd(function: F) -> F:
    """No gradients, and plain tensors also in `torch.inference_mode`: what is stored there may be changed outside."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class LifespanCache(CacheUsage, AttachedCache):
    """A cache for `model(...)` and `model.generate(...)`.

    The model is changed while it works on the cache and not between. It keeps a forward of ours for as long as such a
    cache lives; `with cache:` takes that away at the block's end, `detach()` at once.

    Args:
        model: a loaded causal LM of a supported family.
        gates: a GateBank of this model on its device; or a name of `pretrained_gates()`, a folder or a hub id, from
            which gates are loaded onto the model's device; None for a policy that needs none.
        policy: what each layer keeps, with nothing left open: a HybridPolicy, the name of a policy, or a YAML file (see
            `read_policy`); None: `footprint` decides.
        chunk: tokens of a prompt that go through the model together, each layer freeing what is dead after every 256 of
            them; no logit depends on it beyond rounding.
        first_query: position of the first query that the attribute `footprint` counts.
        bits: of each number of keys and values, 2 to 8, or of keys and of values, (6, 4), packed (see
            `smartkv.quantization.per_token`); None: the model's dtype.
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
        self.rules = self.policy.by_layer(architecture.layers)
        self.first_query, self.bits = check_first_query(first_query), bits
        self.storage = [
            LifespanLayer(cap.window if cap else rule.window or FOREVER, cap, first_query, bits)
            for rule, cap in zip(self.rules, self.policy.caps(architecture), strict=True)
        ]
        self._scored: tuple[Tensor, Tensor | None] | None = None
        super().__init__(model, list(self.storage), chunk)

    # -- the rule -----------------------------------------------------------------------------------------------------

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor | int:
        """TTL of new keys, in tokens: what a subclass overrides to decide otherwise.

        Args:
            layer: index of the layer.
            keys: before the rotary embedding, `[batch, kv_heads, tokens, head_dim]`.
            position: int64 `[batch, tokens]`, each token's place among the real tokens of its row.

        Returns:
            int64 `[batch, kv_heads, tokens]`, 0 … `FOREVER`; or one figure for all. The layer's window comes on top.
        """
        rule = self.rules[layer]
        if rule.rule != "gated" or self.gates is None:
            return self.policy.times_to_live(rule, None)
        return self.policy.times_to_live(rule, self._scores_once(layer, keys), self.gates.ages)

    def scores(self, layer: int, keys: Tensor) -> Tensor | None:
        """What the layer's gates say (see `GateBank.score`), float32 `[batch, kv_heads, tokens]`, or `[…, ages]`; None
        where it has none."""
        if self.gates is None or layer not in self.gates.layers:
            return None
        return self.gates.score(layer, keys)

    def expiry(self, layer: int, keys: Tensor, position: Tensor, sliding_window: int | None) -> Tensor:
        """First position whose query does not see each new key, int64 `[batch, kv_heads, tokens]`. Arguments as above;
        `sliding_window`: the model's own, which hides sinks too."""
        ttl, born = self.times_to_live(layer, keys, position), position[:, None]
        lifetime = self.policy.lifetime(self.rules[layer], ttl, born)
        if sliding_window is not None:
            lifetime = lifetime.clamp(max=sliding_window)
        return (born + lifetime).clamp(max=FOREVER).expand(keys.shape[:3])

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Attention of one layer over the tokens of a forward pass; `[batch, query_heads, tokens, head_dim]`.

        No gradient flows through it.

        Raises:
            SmartKVError: another number of rows, or another dtype, than what the cache holds.
        """
        storage = self.storage[layer]
        output = storage.attend(step, self._judge_of(layer))
        if storage.at_work:
            self.note_peak(storage)
        return output

    def _judge_of(self, layer: int) -> Judge:
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
        """What decides among the heads of a layer that share a cap, float32 of that shape."""
        score = self._scores_once(layer, keys)
        if score is None:
            return torch.zeros(shape, device=keys.device)
        return score if self.gates is None else self.gates.single_score(score)

    def _scores_once(self, layer: int, keys: Tensor) -> Tensor | None:
        """`scores`, computed once for the keys that a layer judges: for their TTL, and for their rank under a cap."""
        if self._scored is None or self._scored[0] is not keys:
            self._scored = (keys, self.scores(layer, keys))
        return self._scored[1]

    @_outside_autograd
    def settle(self) -> None:
        """Free now what is dead, in all layers; decoding does it every few tokens by itself."""
        for layer, storage in enumerate(self.storage):
            storage.at_work = 0
            storage.settle(self._judge_of(layer))
            if storage.at_work:
                self.note_peak(storage)

    def reset(self) -> None:
        """Forget everything, as if new."""
        super().reset()
        self.fullest = 0

    # -- rows of the batch --------------------------------------------------------------------------------------------

    @_outside_autograd
    def select_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 `[rows]`; any may come twice."""
        self.settle()
        for storage in self.storage:
            storage.select(rows.to(self.model.device))
            self.note_peak(storage)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search goes on with other rows."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows: indices, or bool `[batch]`."""
        self.select_rows(torch.arange(self._rows, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.select_rows(torch.arange(self._rows).repeat_interleave(repeats))

    @property
    def _rows(self) -> int:
        return len(self.storage[0].seen) if self.storage[0].is_initialized else 0

    def crop(self, *_: Any) -> None:
        """
        Raises:
            SmartKVError: always; what was freed cannot come back.
        """
        raise SmartKVError(
            "a LifespanCache cannot be cropped (assisted generation and prompt lookup ask for it): "
            "keys that were freed cannot come back"
        )
