"""QuantizedCache: a KV cache that keeps every key, in few bits. It is a baseline for caches that evict.

    model.generate(**inputs, past_key_values=QuantizedCache(model, "int4"))

The latest tokens may stay exact (`residual`). Older ones are encoded once, a group of tokens at a time, and after that
only read. (transformers' own `QuantizedCache` decodes and re-encodes all its tokens whenever its residual is full.)
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from smartkv.cache.autocast import as_autocast, without_autocast
from smartkv.cache.linear_layers import forget_states, layers_of_model, linear_layers, select_states
from smartkv.cache.no_gradients import refuse_backward
from smartkv.cache.ragged import storage_bytes
from smartkv.errors import SmartKVError
from smartkv.models.architecture import check_model
from smartkv.models.wrappers import language_model
from smartkv.quantization.codecs import SCHEMES, Codec, Parts


class QuantizedLayer(CacheLayerMixin):
    """One layer of a cache that quantises: encoded tokens, followed by exact ones.

    With a residual, keys are encoded when the next tokens come, so a query reads at least `residual` tokens before its
    own exactly. Without one, every key is read as it is encoded, the query's own included. How many tokens come at once
    does not change which keys are exact, as long as these are at most one group and the group size divides `residual`.

    Args:
        codec: encodes groups of `codec.block` tokens.
        residual: number of latest tokens that stay exact.

    Attributes:
        parts: the codec's tensors of all encoded tokens, by name.
        keys, values: exact, `[batch, kv_heads, tokens, head_dim]`.
        importance: float32 `[batch, kv_heads, tokens]` of the exact tokens; None: the codec ignores it.
        encoded: number of encoded tokens.

    Raises:
        SmartKVError: a residual that is no number of tokens, or none although the codec encodes groups.
    """

    is_sliding = False
    is_croppable = True  # transformers 5.24 asks; the tokens of the last call can always be dropped
    keys: Tensor
    values: Tensor
    parts: Parts
    importance: Tensor | None

    def __init__(self, codec: Codec, residual: int = 0) -> None:
        super().__init__()
        if type(residual) is not int or residual < 0:
            raise SmartKVError(f"residual must be a number of tokens, 0 or more, got {residual!r}")
        if residual == 0 and codec.block > 1:
            raise SmartKVError(
                f"this codec encodes groups of {codec.block} tokens, which are collected in the residual: "
                "residual must be at least 1, got 0"
            )
        self.codec, self.residual = codec, residual
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.encoded, self.parts, self.importance = False, 0, {}, None
        self.keys = self.values = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create empty storage for keys and values like these, `[batch, kv_heads, tokens, head_dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.detach()[:, :, :0], value_states.detach()[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; return all keys and values as their queries read them.

        Args:
            key_states, value_states: `[batch, kv_heads, tokens, head_dim]`, of the new tokens.

        Returns:
            Keys and values `[batch, kv_heads, all tokens, head_dim]` in the model's dtype. A backward pass through them
            raises a SmartKVError.
        """
        key_states, value_states = as_autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.dtype != key_states.dtype or len(self.keys) != len(key_states):
            raise SmartKVError(
                f"the cache holds {len(self.keys)} rows in {self.dtype}, "
                f"the model was given {len(key_states)} rows and computes in {key_states.dtype}"
            )
        with without_autocast(key_states.device):
            if self.residual:
                self._encode(self.residual)
            self.keys = torch.cat([self.keys, key_states.detach()], dim=2)
            self.values = torch.cat([self.values, value_states.detach()], dim=2)
            if not self.residual:
                self._encode(0)
            key, value = self.read()
        if torch.is_grad_enabled() and key_states.requires_grad:
            return refuse_backward(key, "QuantizedCache"), refuse_backward(value, "QuantizedCache")
        return key, value

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, `[batch, kv_heads, tokens, head_dim]`."""
        if not self.encoded:
            return self.keys, self.values
        key, value = self.codec.decode(self.parts, self.dtype)
        if not self.keys.shape[2]:
            return key, value
        return torch.cat([key, self.keys], dim=2), torch.cat([value, self.values], dim=2)

    def _encode(self, residual: int) -> None:
        """Encode whole groups of the tokens before the latest `residual` ones."""
        tokens = (self.keys.shape[2] - residual) // self.codec.block * self.codec.block
        if tokens <= 0:
            return
        importance = None if self.importance is None else self.importance[:, :, :tokens]
        new = self.codec.encode(self.keys[:, :, :tokens], self.values[:, :, :tokens], importance)
        self.parts = {name: torch.cat([self.parts[name], new[name]], dim=2) for name in new} if self.parts else new
        self.encoded += tokens
        self.keys, self.values = self.keys[:, :, tokens:].clone(), self.values[:, :, tokens:].clone()
        if self.importance is not None:
            self.importance = self.importance[:, :, tokens:].clone()

    @property
    def storage_bytes(self) -> int:
        """Bytes of all allocated tensors."""
        exact = [self.keys, self.values, self.importance] if self.is_initialized else []
        return storage_bytes([*self.parts.values(), *exact])

    @property
    def exact_bytes(self) -> int:
        """Bytes of the keys and values that are stored in the model's dtype."""
        return storage_bytes([self.keys, self.values]) if self.is_initialized else 0

    @property
    def read_bytes(self) -> int:
        """Bytes of the decoded copy of all keys and values that `read` makes; 0 while nothing is encoded."""
        if not self.encoded:
            return 0
        rows, kv_heads, _, head_dim = self.keys.shape
        return 2 * rows * kv_heads * self.get_seq_length() * head_dim * self.dtype.itemsize

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 `[rows]`, which may repeat."""
        self.parts = {name: tensor.index_select(0, rows) for name, tensor in self.parts.items()}
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.importance = None if self.importance is None else self.importance.index_select(0, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search goes on with, int64 `[rows]`."""
        if self.is_initialized:  # else it has no rows yet
            self.select(beam_idx.to(self.device))

    def crop(self, tokens: int) -> None:
        """Drop the latest tokens.

        Args:
            tokens: minus the number of tokens to drop, 0 for none. A positive number is the number of tokens to keep,
                as in transformers 5.2.

        Raises:
            SmartKVError: encoded tokens would have to be dropped, of a codec that keeps the latest tokens exact.
        """
        if not isinstance(tokens, int):
            raise SmartKVError(f"crop takes a number of tokens, minus how many to drop, got {tokens!r}")
        held = self.get_seq_length()
        keep = min(held, tokens) if tokens > 0 else max(0, held + tokens)
        if keep == held:
            return
        if keep < self.encoded:
            if self.residual:
                raise SmartKVError(
                    f"{self.encoded} tokens are encoded and cannot be dropped, asked to keep {keep} tokens"
                )
            self.parts = {
                name: part[:, :, : part.shape[2] * keep // self.encoded].clone() for name, part in self.parts.items()
            }
            self.encoded = keep
        self.keys, self.values = self.keys[:, :, : keep - self.encoded], self.values[:, :, : keep - self.encoded]
        self.importance = None if self.importance is None else self.importance[:, :, : keep - self.encoded]

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens so far."""
        return self.encoded + (self.keys.shape[2] if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (keys, offset) for a causal mask."""
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # transformers 5.2: positions
        return self.get_seq_length() + tokens, 0

    def get_max_length(self) -> int:
        """Return −1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.2


class QuantizedCache(Cache):
    """A KV cache for `model(...)` and `model.generate(...)` that keeps every key, quantised.

    Args:
        model: a causal LM of a supported family.
        codec: name of a scheme (fp16, int8, int4, kivi, kivi2, kivi4, adaptive), or a codec. With `adaptive` the bits
            of a token depend on the range of its channels alone; an `AdaptiveCache` also weighs its importance.
        residual: number of latest tokens that stay exact. None: that of the scheme, or for a codec one group (0 if it
            encodes single tokens).

    Raises:
        SmartKVError: an unknown scheme, or a residual that does not go with the codec.
    """

    def __init__(self, model: PreTrainedModel, codec: str | Codec, residual: int | None = None) -> None:
        self.architecture = check_model(model)
        self.codec, usual = scheme(codec)
        self.storage = [
            QuantizedLayer(self.codec, usual if residual is None else residual) for _ in range(self.architecture.layers)
        ]
        super().__init__(layers=layers_of_model(language_model(model).config, list(self.storage)))

    # -- rows of the batch, also of the states of linear attention ----------------------------------------------------

    def reset(self) -> None:
        """Forget everything."""
        forget_states(self.layers)
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search goes on with, int64 `[rows]`."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch: indices int64 `[rows]`, or a mask bool `[batch]`."""
        if self.storage[0].is_initialized:
            self._select(torch.arange(len(self.storage[0].keys), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self._select(torch.arange(len(self.storage[0].keys)).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        for layer in self.storage:
            layer.reorder_cache(rows)
        select_states(self.layers, rows)

    def crop(self, tokens: int) -> None:
        """Drop the latest tokens; arguments and errors as `QuantizedLayer.crop`.

        Raises:
            SmartKVError: the model has layers with linear attention, whose states cannot go back.
        """
        if linear_layers(self.layers):
            raise SmartKVError(
                f"a {type(self).__name__} of a {self.architecture.model_type} cannot be cropped (assisted generation "
                "and prompt lookup ask for it): the states of its layers with linear attention cannot go back"
            )
        super().crop(tokens)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def storage_bytes(self) -> int:
        """Bytes that all layers hold now, scales, zeros and residual included."""
        return sum(layer.storage_bytes for layer in self.storage)

    @property
    def exact_bytes(self) -> int:
        """Bytes of the keys and values that are stored in the model's dtype."""
        return sum(layer.exact_bytes for layer in self.storage)

    @property
    def read_bytes(self) -> int:
        """Bytes of the decoded copy that attention reads; only one layer's copy exists at a time."""
        return max(layer.read_bytes for layer in self.storage)

    @property
    def ratio_payload(self) -> float:
        """Bits of the codes alone divided by those of float16."""
        return self.codec.payload(self.architecture.head_dim)

    @property
    def ratio_stored(self) -> float:
        """Bytes of all layers divided by those of the same tokens in float16.

        Raises:
            SmartKVError: the cache has not seen a token yet.
        """
        if not self.get_seq_length():
            raise SmartKVError("the cache has not seen a token yet")
        rows, arch = len(self.storage[0].keys), self.architecture
        half = 2 * arch.layers * arch.kv_heads * arch.head_dim * 2 * self.get_seq_length() * rows
        return self.storage_bytes / half


def scheme(codec: str | Codec) -> tuple[Codec, int]:
    """Return a codec and its usual residual, in tokens.

    Args:
        codec: name of a scheme, or a codec.

    Raises:
        SmartKVError: neither.
    """
    if not isinstance(codec, str):
        if not isinstance(codec, Codec):
            raise SmartKVError(f"codec must be a codec or one of the schemes {', '.join(SCHEMES)}, got {codec!r}")
        return codec, 0 if codec.block == 1 else codec.block
    if codec not in SCHEMES:
        raise SmartKVError(f"there is no scheme '{codec}': expected {', '.join(SCHEMES)}")
    return SCHEMES[codec]
