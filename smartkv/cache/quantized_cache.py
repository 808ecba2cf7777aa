"""Caches that keep every key, in few bits: baselines for those that evict, and what both have in common.

    model.generate(**inputs, past_key_values=QuantizedCache(model, "int4"))

The latest tokens may stay exact (`residual`); what is older is encoded once, block by block, and then only read.
(transformers' own `QuantizedCache` decodes all it holds and encodes it anew, every time its residual is full.)
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from smartkv.cache.arguments import check_model
from smartkv.cache.ragged import storage_bytes
from smartkv.errors import SmartKVError
from smartkv.quantization.codecs import SCHEMES, Codec, Parts


class QuantizedLayer(CacheLayerMixin):
    """One layer.

    Which keys are exact does not hang on how many tokens come at once, if those that come together are a block at most
    and blocks divide `residual`: with a residual, keys are encoded when the next tokens come, so that a query sees
    exactly at least `residual` tokens before its own. With none every key is read as it is stored, the query's own too.

    Args:
        codec: how blocks are stored.
        residual: latest tokens that stay exact.

    Attributes:
        parts: of the codec, of all encoded tokens.
        keys, values: exact, `[batch, kv_heads, tokens, head_dim]`.
        importance: float32 `[batch, kv_heads, tokens]` of the exact tokens; None: not asked for.
        encoded: tokens that are in `parts`.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    parts: Parts
    importance: Tensor | None

    def __init__(self, codec: Codec, residual: int = 0) -> None:
        super().__init__()
        if type(residual) is not int or residual < 0:
            raise SmartKVError(f"residual must be a number of tokens, got {residual!r}")
        if residual == 0 and codec.block > 1:
            raise SmartKVError(f"blocks of {codec.block} tokens need a residual of at least 1: they fill up in it")
        self.codec, self.residual = codec, residual
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.is_initialized, self.encoded, self.parts, self.importance = False, 0, {}, None
        self.keys = self.values = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty storage. Both `[batch, kv_heads, tokens, head_dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; all keys and values as a later query sees them, in the model's dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.residual:
            self._encode(self.residual)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        if not self.residual:
            self._encode(0)
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values, `[batch, kv_heads, tokens, head_dim]`."""
        if not self.encoded:
            return self.keys, self.values
        key, value = self.codec.decode(self.parts, self.dtype)
        if not self.keys.shape[2]:
            return key, value
        return torch.cat([key, self.keys], dim=2), torch.cat([value, self.values], dim=2)

    def _encode(self, residual: int) -> None:
        """Store whole blocks of what is older than so many tokens."""
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
        """Bytes of all tensors, as allocated."""
        exact = [self.keys, self.values, self.importance] if self.is_initialized else []
        return storage_bytes([*self.parts.values(), *exact])

    @property
    def exact_bytes(self) -> int:
        """Those of keys and values in the model's dtype."""
        return storage_bytes([self.keys, self.values]) if self.is_initialized else 0

    @property
    def read_bytes(self) -> int:
        """Of the copy of all keys and values that `read` makes."""
        if not self.encoded:
            return 0
        rows, kv_heads, _, head_dim = self.keys.shape
        return 2 * rows * kv_heads * self.get_seq_length() * head_dim * self.dtype.itemsize

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 `[rows]`."""
        if not self.is_initialized:
            return
        self.parts = {name: tensor.index_select(0, rows) for name, tensor in self.parts.items()}
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.importance = None if self.importance is None else self.importance.index_select(0, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search goes on with other rows."""
        self.select(beam_idx.to(self.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows: indices, or bool `[batch]`."""
        self.select(torch.arange(len(self.keys), device=self.device)[indices.to(self.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.select(torch.arange(len(self.keys), device=self.device).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Forget the latest tokens.

        Raises:
            SmartKVError: encoded ones would have to go.
        """
        keep = max_length if max_length >= 0 else self.get_seq_length() + max_length
        if keep >= self.get_seq_length():
            return
        if keep < self.encoded:
            raise SmartKVError(f"{self.encoded} tokens are encoded and cannot be cropped, asked for {keep}")
        self.keys, self.values = self.keys[:, :, : keep - self.encoded], self.values[:, :, : keep - self.encoded]
        self.importance = None if self.importance is None else self.importance[:, :, : keep - self.encoded]

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far."""
        return self.encoded + (self.keys.shape[2] if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, offset) of a mask."""
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # 5.2 hands the positions
        return self.get_seq_length() + tokens, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.2


class QuantizedCache(Cache):
    """A cache for `model(...)` and `model.generate(...)` that keeps every key, quantised.

    Args:
        model: a causal LM of a supported family.
        codec: a scheme (fp16, int8, int4, kivi, kivi2, kivi4), or a codec.
        residual: latest tokens that stay exact; None: the scheme's own (a codec's own block).

    Raises:
        SmartKVError: no such scheme, or a residual that does not go with it.
    """

    def __init__(self, model: PreTrainedModel, codec: str | Codec, residual: int | None = None) -> None:
        self.architecture = check_model(model)
        self.codec, usual = scheme(codec)
        self.storage = [
            QuantizedLayer(self.codec, usual if residual is None else residual) for _ in range(self.architecture.layers)
        ]
        super().__init__(layers=list(self.storage))

    @property
    def storage_bytes(self) -> int:
        """Bytes that all layers hold now, scales, zeros and residual included."""
        return sum(layer.storage_bytes for layer in self.storage)

    @property
    def exact_bytes(self) -> int:
        """Those of keys and values that are held in the model's dtype."""
        return sum(layer.exact_bytes for layer in self.storage)

    @property
    def read_bytes(self) -> int:
        """Of the decoded copy that a layer attends to, one at a time."""
        return max(layer.read_bytes for layer in self.storage)

    @property
    def ratio_payload(self) -> float:
        """Bits of the codes over those of float16."""
        return self.codec.payload(self.architecture.head_dim)

    @property
    def ratio_stored(self) -> float:
        """Bytes held over those of the same tokens in float16.

        Raises:
            SmartKVError: it has seen no token.
        """
        if not self.get_seq_length():
            raise SmartKVError("the cache has not seen a token yet")
        rows, arch = len(self.storage[0].keys), self.architecture
        half = 2 * arch.gates * arch.head_dim * 2 * self.get_seq_length() * rows
        return self.storage_bytes / half


def scheme(codec: str | Codec) -> tuple[Codec, int]:
    """A codec and its residual, by name or as given.

    Raises:
        SmartKVError: no such scheme.
    """
    if not isinstance(codec, str):
        if not isinstance(codec, Codec):
            raise SmartKVError(f"codec must be a codec or one of the schemes {', '.join(SCHEMES)}, got {codec!r}")
        return codec, 0 if codec.block == 1 else codec.block
    if codec not in SCHEMES:
        raise SmartKVError(f"there is no scheme '{codec}': expected {', '.join(SCHEMES)}")
    return SCHEMES[codec]
