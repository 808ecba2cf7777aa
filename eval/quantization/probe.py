"""Exact attention of a model, beside the same with keys and values that went through codecs."""

import math
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.cache.adaptive_cache import importance_by
from smartkv.cache.attached import AttachedCache
from smartkv.cache.model_patch import EvictionStep
from smartkv.gates.bank import GateBank
from smartkv.quantization.codecs import Adaptive, Codec


class Probe(AttachedCache):
    """Takes one text in one piece; the model's output is exact.

    Args:
        model: of a supported family.
        codecs: by name; every token goes through them, with no residual.
        gates: tell codecs what is important; None: the attention that a key has got when its block is encoded does.
        residual: latest tokens that stay exact until then, of codecs that ask for importance.
    """

    def __init__(
        self, model: PreTrainedModel, codecs: dict[str, Codec], gates: GateBank | None = None, residual: int = 0
    ) -> None:
        layers = DynamicCache(config=model.config).layers
        super().__init__(model, layers, chunk=2**20)
        self.codecs, self.gates, self.residual = codecs, gates, residual
        self.found: dict[str, dict[str, list[float]]] = {name: {} for name in codecs}
        self.held: list[tuple[Tensor, Tensor, dict[str, Tensor | None]]] = []  # of each layer, importance by codec

    @property
    def block(self) -> int:
        """Texts are a multiple of so many tokens."""
        return math.lcm(*(codec.block for codec in self.codecs.values()))

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        place = torch.arange(step.key.shape[2], device=step.key.device)
        exact = _attention(step, step.key, step.value)
        importance: dict[str, Tensor | None] = {}
        for name, codec in self.codecs.items():
            if not isinstance(codec, Adaptive):
                importance[name] = None
            elif self.gates is not None:
                importance[name] = importance_by(self.gates, layer, step.pre_rope)
            else:  # when a block is full, and as many tokens have come as stay exact
                importance[name] = _received(step, (place // codec.block + 1) * codec.block + self.residual)
            parts = codec.encode(step.key, step.value, importance[name])
            key, value = codec.decode(parts, torch.float32)
            output = _attention(step, key, value)
            pairs = {"key": (key, step.key), "value": (value, step.value), "output": (output, exact)}
            for what, (mine, theirs) in pairs.items():
                error = float((mine - theirs).norm() / theirs.float().norm())
                self.found[name].setdefault(f"error_{what}", []).append(error)
        self.held.append((step.key, step.value, importance))
        return exact.to(step.query.dtype)

    def errors(self) -> dict[str, dict[str, float]]:
        """Of each codec, mean over layers: `error_key`, `error_value`, `error_output`."""
        return {
            name: {what: sum(values) / len(values) for what, values in errors.items()}
            for name, errors in self.found.items()
        }

    def times(self, repeats: int) -> dict[str, dict[str, float]]:
        """Of each codec, milliseconds for all layers, median of `repeats` in turns: `encode_ms`, `decode_ms`."""
        taken: dict[str, dict[str, list[float]]] = {name: {"encode_ms": [], "decode_ms": []} for name in self.codecs}
        for _ in range(repeats):
            for name, codec in self.codecs.items():
                start = self._now()
                parts = [codec.encode(key, value, importance[name]) for key, value, importance in self.held]
                middle = self._now()
                for each in parts:
                    codec.decode(each, self.held[0][0].dtype)
                taken[name]["encode_ms"].append(1000 * (middle - start))
                taken[name]["decode_ms"].append(1000 * (self._now() - middle))
        return {
            name: {what: statistics.median(values) for what, values in each.items()} for name, each in taken.items()
        }

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _weights(step: EvictionStep, key: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Causal attention in float32, some queries at a time: which, `[batch, kv_heads, group, queries, tokens]`."""
    tokens, kv_heads = key.shape[2], key.shape[1]
    query = step.query.float().unflatten(1, (kv_heads, -1))
    place = torch.arange(tokens, device=key.device)
    for start in range(0, tokens, 128):
        here = slice(start, start + 128)
        scores = query[..., here, :] @ key.float()[:, :, None].mT * step.scaling
        seen = place <= place[here, None]
        if step.sliding_window is not None:
            seen &= place > place[here, None] - step.sliding_window
        yield here, scores.masked_fill(~seen, -math.inf).softmax(dim=-1)


def _attention(step: EvictionStep, key: Tensor, value: Tensor) -> Tensor:
    """What comes of it, float32 `[batch, query_heads, tokens, head_dim]`."""
    wide = value.float()[:, :, None]
    return torch.cat([weights @ wide for _, weights in _weights(step, key)], dim=3).flatten(1, 2)


def _received(step: EvictionStep, until: Tensor) -> Tensor:
    """Attention that each key gets from queries before `until` (int64 `[tokens]`), `[batch, kv_heads, tokens]`."""
    place, total = torch.arange(len(until), device=until.device), torch.zeros(step.key.shape[:3], device=until.device)
    for here, weights in _weights(step, step.key):
        total += (weights * (place[here, None] < until)).sum(dim=(2, 3))
    return total
