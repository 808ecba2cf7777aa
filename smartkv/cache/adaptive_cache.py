"""AdaptiveCache: a KV cache that keeps every key, important ones in more bits.

The importance of a key comes from the attention it got so far, which takes attention weights; or from gates, which read
the key alone.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.arguments import check_model, resolve_gates
from smartkv.cache.attached import AttachedCache
from smartkv.cache.model_patch import EvictionStep
from smartkv.cache.quantized_cache import QuantizedCache, QuantizedLayer
from smartkv.cache.ragged import storage_bytes
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import Log4Lifespan, OrdinalAges
from smartkv.models.layer_ranges import format_layers
from smartkv.quantization.codecs import SCHEMES, Adaptive

SCORE_ELEMENTS = 2**22  # of attention scores that are computed at once


def importance_by(gates: GateBank, layer: int, keys: Tensor) -> Tensor:
    """Return the importance of tokens by gates: the exponential of their prediction, which is a logarithm.

    Args:
        gates: the model's gates.
        layer: index of the layer.
        keys: pre-RoPE, `[batch, kv_heads, tokens, head_dim]`.

    Returns:
        float32 `[batch, kv_heads, tokens]`, above 0.
    """
    score = gates.single_score(gates.score(layer, keys))
    in_log4 = gates.details.get("target") in (Log4Lifespan.target, OrdinalAges.target)
    return torch.exp(score * (math.log(4) if in_log4 else 1.0))


class AdaptiveCache(QuantizedCache, AttachedCache):
    """A KV cache for `model(...)` and `model.generate(...)` that gives important tokens more bits.

    Args:
        model: a causal LM of a supported family.
        gates: a GateBank of this model on its device; or a name of `pretrained_gates()`, a folder or a hub id, from
            which gates are loaded onto the model's device. Their prediction is a token's importance. None: a token's
            importance is the attention that it has got when it is encoded.
        codec: encodes the tokens; it has the budget, the group size and the levels.
        residual: number of latest tokens that stay exact; None: one group.
        chunk: number of prompt tokens that go through the model together.

    Raises:
        SmartKVError: an argument of a wrong type, gates of another model, or a layer without gates.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: GateBank | str | Path | None = None,
        codec: Adaptive = SCHEMES["adaptive"][0],  # type: ignore[assignment]
        residual: int | None = None,
        chunk: int = 1024,
    ) -> None:
        layers = check_model(model).layers
        if not isinstance(codec, Adaptive):
            raise SmartKVError(
                f"codec of an AdaptiveCache must be an Adaptive, as in Adaptive(budget=0.4), got {codec!r}"
            )
        self.codec, self.gates = codec, resolve_gates(model, gates)
        if self.gates is not None and (missing := sorted(set(range(layers)) - set(self.gates.layers))):
            raise SmartKVError(
                f"every layer of an AdaptiveCache needs gates, these have none for layers {format_layers(missing)}"
            )
        self.real: Tensor | None = None  # bool `[batch, tokens]`, False for padding; None: no padding so far
        self.storage = [QuantizedLayer(codec, codec.block if residual is None else residual) for _ in range(layers)]
        AttachedCache.__init__(self, model, list(self.storage), chunk)

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Store the tokens of a forward pass in one layer, and compute their attention without gradients.

        Queries read all keys as they are stored: old ones decoded, the latest exactly.

        Returns:
            `[batch, query_heads, tokens, head_dim]`.
        """
        storage = self.storage[layer]
        before, tokens = storage.get_seq_length(), step.key.shape[2]
        self._note_padding(layer, step, before)
        new = self._importance(layer, step.pre_rope)
        importance = new if storage.importance is None else torch.cat([storage.importance, new], dim=2)
        storage.importance = importance
        key, value = storage.update(step.key, step.value)
        exact, total = storage.keys.shape[2], before + tokens
        kv_heads = key.shape[1]
        grouped = step.query.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, tokens, head_dim]
        output = torch.empty_like(grouped)
        index = torch.arange(total, device=key.device)
        size = max(1, SCORE_ELEMENTS // (step.query.shape[0] * step.query.shape[1] * total))
        for start in range(0, tokens, size):
            here = slice(start, min(start + size, tokens))
            at = index[before:][here, None]
            seen = index <= at
            if step.sliding_window is not None:
                seen &= index > at - step.sliding_window
            seen = seen[None, None, None]
            if self.real is not None:  # a query of padding sees itself: a softmax over nothing would be NaN
                seen = seen & (self.real[:, None, None, None] | (index == at))
            scores = (grouped[..., here, :] @ key[:, :, None].transpose(-1, -2)).float() * step.scaling
            weights = scores.masked_fill_(~seen, -math.inf).softmax(dim=-1)
            output[..., here, :] = weights.to(value.dtype) @ value[:, :, None]
            if self.gates is None and storage.importance is not None:
                if self.real is not None:  # attention from padding does not count
                    weights = weights * self.real[:, None, None, before:][..., here, None]
                storage.importance += weights[..., total - exact :].sum(dim=(2, 3))
        return output.flatten(1, 2)

    @property
    def storage_bytes(self) -> int:
        """Bytes of all allocated tensors."""
        return super().storage_bytes + (0 if self.real is None else storage_bytes([self.real]))

    def _note_padding(self, layer: int, step: EvictionStep, before: int) -> None:
        """Record which tokens are padding, in the first layer of a pass.

        Args:
            layer: index of the layer.
            step: the layer's inputs.
            before: number of tokens before this pass.
        """
        if layer or (self.real is None and step.real is None):
            return
        rows, tokens = step.key.shape[0], step.key.shape[2]
        old = step.key.new_ones(rows, before, dtype=torch.bool) if self.real is None else self.real
        new = step.key.new_ones(rows, tokens, dtype=torch.bool) if step.real is None else step.real
        self.real = torch.cat([old, new], dim=1)

    def _importance(self, layer: int, keys: Tensor) -> Tensor:
        """Return the importance of new tokens at their birth, float32 `[batch, kv_heads, tokens]`."""
        if self.gates is None:
            return torch.zeros(keys.shape[:3], device=keys.device)
        return importance_by(self.gates, layer, keys)

    # -- rows of the batch --------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all keys, as if the cache were new."""
        super().reset()
        self.real = None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep the rows that beam search goes on with, int64 `[rows]`."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch: indices int64 `[rows]`, or a mask bool `[batch]`."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.real is not None:
            self.real = self.real.repeat_interleave(repeats, dim=0)

    def _select(self, rows: Tensor) -> None:
        if self.real is not None:
            self.real = self.real[rows.to(self.real.device)]

    def crop(self, max_length: int) -> None:
        """Drop the latest tokens; arguments and errors as `QuantizedLayer.crop`."""
        super().crop(max_length)
        if self.real is not None:
            self.real = self.real[:, : self.get_seq_length()]
