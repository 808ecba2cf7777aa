"""Errors and times of codecs beside exact attention: of a model's own keys, or of synthetic ones."""

import math
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from eval.quantization.stand_ins import Shape
from smartkv.cache.adaptive_cache import importance_by
from smartkv.cache.attached import AttachedCache
from smartkv.cache.forward_pass import EvictionStep
from smartkv.gates.bank import GateBank
from smartkv.models.softmax import Softmax
from smartkv.quantization.codecs import Adaptive, Codec

OUTLIERS = 16  # of so many channels of a synthetic key one is an outlier
OUTLIER_SIZE = 6.0  # its standard deviation; that of the others is 1


class CodecComparison:
    """What codecs make of the keys and values of some layers, beside exact attention.

    Args:
        codecs: name -> codec; every token goes through it, none stays exact.
        residual: latest tokens that stay exact until a block is encoded, for codecs that ask for importance.

    Attributes:
        errors_by_layer: name -> error_key, error_value, error_output -> one figure a layer.
        layers_read: of each layer key, value and the importance that each codec asks for.
    """

    def __init__(self, codecs: dict[str, Codec], residual: int = 0) -> None:
        self.codecs, self.residual = codecs, residual
        self.errors_by_layer: dict[str, dict[str, list[float]]] = {name: {} for name in codecs}
        self.layers_read: list[tuple[Tensor, Tensor, dict[str, Tensor | None]]] = []

    @property
    def block(self) -> int:
        """Number of tokens of which the length of a text must be a multiple."""
        return math.lcm(*(codec.block for codec in self.codecs.values()))

    def read(self, step: EvictionStep, important: Tensor | None = None) -> Tensor:
        """Note each codec's errors of keys, values and output.

        Args:
            step: the inputs of a layer's attention.
            important: float32 `[batch, kv_heads, tokens]`, for codecs that ask. None: the attention that a key has
                received until its block is encoded.

        Returns:
            The exact attention, float32 `[batch, query_heads, tokens, head_dim]`.
        """
        place = torch.arange(step.key.shape[2], device=step.key.device)
        exact = _attention(step, step.key, step.value)
        importance: dict[str, Tensor | None] = {}
        for name, codec in self.codecs.items():
            if not isinstance(codec, Adaptive):
                importance[name] = None
            elif important is not None:
                importance[name] = important
            else:  # a block is encoded when it is full and as many tokens have followed as stay exact
                importance[name] = _received(step, (place // codec.block + 1) * codec.block + self.residual)
            parts = codec.encode(step.key, step.value, importance[name])
            key, value = codec.decode(parts, torch.float32)
            output = _attention(step, key, value)
            pairs = {"key": (key, step.key), "value": (value, step.value), "output": (output, exact)}
            for what, (decoded, original) in pairs.items():
                error = float((decoded - original).norm() / original.float().norm())
                self.errors_by_layer[name].setdefault(f"error_{what}", []).append(error)
        self.layers_read.append((step.key, step.value, importance))
        return exact

    def errors(self) -> dict[str, dict[str, float]]:
        """Return each codec's `error_key`, `error_value` and `error_output`: relative (Frobenius), mean over layers."""
        return {
            name: {what: sum(values) / len(values) for what, values in errors.items()}
            for name, errors in self.errors_by_layer.items()
        }

    def times(self, repeats: int) -> dict[str, dict[str, float]]:
        """Return each codec's milliseconds for all layers, median of `repeats` rounds: `encode_ms`, `decode_ms`."""
        taken: dict[str, dict[str, list[float]]] = {name: {"encode_ms": [], "decode_ms": []} for name in self.codecs}
        for _ in range(repeats):
            for name, codec in self.codecs.items():
                start = self._now()
                parts = [codec.encode(key, value, importance[name]) for key, value, importance in self.layers_read]
                middle = self._now()
                for each in parts:
                    codec.decode(each, self.layers_read[0][0].dtype)
                taken[name]["encode_ms"].append(1000 * (middle - start))
                taken[name]["decode_ms"].append(1000 * (self._now() - middle))
        return {
            name: {what: statistics.median(values) for what, values in each.items()} for name, each in taken.items()
        }

    def _now(self) -> float:
        if self.layers_read[0][0].device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Probe(AttachedCache):
    """Cache that takes one text in one piece and compares each layer's attention with what codecs make of it.

    The model's own output is exact.

    Args:
        model: of a supported family.
        comparison: the codecs, and what is noted about them.
        gates: decide which keys are important, for codecs that ask. None: the attention that they receive does.
    """

    def __init__(self, model: PreTrainedModel, comparison: CodecComparison, gates: GateBank | None = None) -> None:
        own = DynamicCache(config=model.config).layers
        layers = [layer for layer in own if isinstance(layer, CacheLayerMixin)]
        super().__init__(model, layers, chunk=2**20)
        self.gates, self.comparison = gates, comparison

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Return the exact attention, and note each codec's errors of keys, values and output."""
        important = None if self.gates is None else importance_by(self.gates, layer, step.pre_rope)
        return self.comparison.read(step, important).to(step.query.dtype)


def synthetic_layer(shape: Shape, tokens: int, seed: int) -> EvictionStep:
    """Return the attention inputs of a layer of random numbers, float32, whose keys have outlier channels.

    Keys of language models have a few channels that are large in every token, which is what quantisation suffers from.

    Args:
        shape: of the model's cache.
        tokens: length of the text.
        seed: of the numbers.
    """
    random = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, shape.kv_heads, tokens, shape.head_dim, generator=random) for _ in range(3))
    key[..., ::OUTLIERS] *= OUTLIER_SIZE
    query[..., ::OUTLIERS] /= OUTLIER_SIZE  # as in a model, whose scores stay in range
    return EvictionStep(query, key, value, key, None, Softmax(shape.head_dim**-0.5), None)


def _weights(step: EvictionStep, key: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a slice of queries and their causal attention, float32 `[batch, kv_heads, group, queries, tokens]`."""
    tokens, kv_heads = key.shape[2], key.shape[1]
    query = step.query.float().unflatten(1, (kv_heads, -1))
    place = torch.arange(tokens, device=key.device)
    for start in range(0, tokens, 128):
        here = slice(start, start + 128)
        scores = step.softmax.scores(query[..., here, :] @ key.float()[:, :, None].mT)
        seen = place <= place[here, None]
        if step.sliding_window is not None:
            seen &= place > place[here, None] - step.sliding_window
        yield here, step.softmax.probabilities(scores.masked_fill(~seen, -math.inf))


def _attention(step: EvictionStep, key: Tensor, value: Tensor) -> Tensor:
    """Return the attention output, float32 `[batch, query_heads, tokens, head_dim]`."""
    wide = value.float()[:, :, None]
    return torch.cat([weights @ wide for _, weights in _weights(step, key)], dim=3).flatten(1, 2)


def _received(step: EvictionStep, until: Tensor) -> Tensor:
    """Return the attention that keys get from queries before `until`, float32 `[batch, kv_heads, tokens]`.

    Args:
        step: query and key of a layer.
        until: of each key, int64 `[tokens]`.
    """
    place, total = torch.arange(len(until), device=until.device), torch.zeros(step.key.shape[:3], device=until.device)
    for here, weights in _weights(step, step.key):
        total += (weights * (place[here, None] < until)).sum(dim=(2, 3))
    return total
