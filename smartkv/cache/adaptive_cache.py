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

from smartkv.cache.attached import AttachedCache
from smartkv.cache.forward_pass import EvictionStep
from smartkv.cache.quantized_cache import QuantizedCache, QuantizedLayer
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import Log4Lifespan, OrdinalAges
from smartkv.models.architecture import check_model
from smartkv.models.layer_ranges import format_layers
from smartkv.policies.arguments import resolve_gates
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
        real = self.seen_tokens.real(before + tokens)
        real = None if real is None else real.to(step.key.device)  # the layers of a model may lie on several devices
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
            if real is not None:  # a query of padding sees itself: a softmax over nothing would be NaN
                seen = seen & (real[:, None, None, None] | (index == at))
            scores = step.softmax.scores(grouped[..., here, :] @ key[:, :, None].transpose(-1, -2))
            weights = step.softmax.probabilities(scores.masked_fill_(~seen, -math.inf))
            output[..., here, :] = weights.to(value.dtype) @ value[:, :, None]
            if self.gates is None and storage.importance is not None:
                if real is not None:  # attention from padding does not count
                    weights = weights * real[:, None, None, before:][..., here, None]
                storage.importance += weights[..., total - exact :].sum(dim=(2, 3))
        return output.flatten(1, 2)

    def _importance(self, layer: int, keys: Tensor) -> Tensor:
        """Return the importance of new tokens at their birth, float32 `[batch, kv_heads, tokens]`."""
        if self.gates is None:
            return torch.zeros(keys.shape[:3], device=keys.device)
        return importance_by(self.gates, layer, keys)

    # -- rows of the batch --------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep the rows that beam search goes on with, int64 `[rows]`."""
        with self.in_use():
            super().reorder_cache(beam_idx)
            self.seen_tokens.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch: indices int64 `[rows]`, or a mask bool `[batch]`."""
        with self.in_use():
            super().batch_select_indices(indices)
            self.seen_tokens.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        with self.in_use():
            super().batch_repeat_interleave(repeats)
            self.seen_tokens.select(torch.arange(len(self.seen_tokens.ids)).repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Drop the latest tokens; arguments and errors as `QuantizedLayer.crop`."""
        with self.in_use():
            super().crop(tokens)
            self.seen_tokens.keep(self.get_seq_length())
