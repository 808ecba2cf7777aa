"""The shape of a model's KV cache, its fingerprint, and where its pre-RoPE keys are."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError


@dataclass(frozen=True)
class KeySite:
    """Where a family's attention module holds the key just before the rotary embedding.

    Attributes:
        module: name of the submodule of the attention module whose output is read.
        read: (its output, attention module) -> keys `[batch, kv_heads, tokens, head_dim]`.
        rotary: whether the model rotates keys after this point.
    """

    module: str
    read: Callable[[Tensor, nn.Module], Tensor]
    rotary: bool = True


def _read_projection(output: Tensor, attention: nn.Module) -> Tensor:
    """`k_proj`: `[batch, tokens, kv_heads · head_dim]`."""
    return output.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _read_norm(output: Tensor, attention: nn.Module) -> Tensor:
    """Qwen3's `k_norm`, which runs before the heads are moved forward: `[batch, tokens, kv_heads, head_dim]`."""
    return output.transpose(1, 2)


def _read_fused(output: Tensor, attention: nn.Module) -> Tensor:
    """GPT-2's `c_attn`: query, key and value side by side, `[batch, tokens, 3 · heads · head_dim]`."""
    return output.chunk(3, dim=-1)[1].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


KEY_SITES = {
    "llama": KeySite("k_proj", _read_projection),
    "mistral": KeySite("k_proj", _read_projection),
    "qwen2": KeySite("k_proj", _read_projection),
    "qwen3": KeySite("k_norm", _read_norm),
    "gpt2": KeySite("c_attn", _read_fused, rotary=False),
}


@dataclass(frozen=True)
class Architecture:
    """The shape of a model's KV cache, and how many positions it was made for."""

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int

    @classmethod
    def of(cls, config: Any) -> "Architecture":
        """Read a transformers config.

        Raises:
            SmartKVError: the model's family is not one whose pre-RoPE key we know.
        """
        if config.model_type not in KEY_SITES:
            raise SmartKVError(
                f"model type '{config.model_type}' is not supported: expected one of {', '.join(sorted(KEY_SITES))}"
            )
        query_heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            query_heads=query_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
            max_positions=config.max_position_embeddings,
        )

    @property
    def gates(self) -> int:
        """How many gates the model has: one for each KV head of each layer."""
        return self.layers * self.kv_heads


@dataclass(frozen=True)
class Fingerprint:
    """What shards and gates remember of the model they were made from.

    The first four fields must match; `weight_hash` (of layer 0's key projection) only warns, because a tuned or
    quantised copy of a model may use its gates.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    weight_hash: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Fingerprint":
        """The fingerprint of a loaded model."""
        arch = Architecture.of(model.config)
        attention = attention_modules(model)[0]
        projection = attention.get_submodule("c_attn" if arch.model_type == "gpt2" else "k_proj")
        # only the signs, so that the same weights keep their hash in any dtype
        signs = projection.get_parameter("weight").detach().signbit().cpu().numpy()
        digest = hashlib.sha256(numpy.packbits(signs).tobytes()).hexdigest()[:16]
        return cls(arch.model_type, arch.layers, arch.kv_heads, arch.head_dim, digest)

    def describe(self) -> str:
        """The architecture in words."""
        return f"{self.model_type}, {self.layers} layers × {self.kv_heads} KV heads × {self.head_dim} dims"

    def check(self, other: "Fingerprint", what: str) -> None:
        """Refuse `other` (of `what`, e.g. "the shards in runs/x") where its architecture is not this one.

        Raises:
            SmartKVError: naming both architectures.
        """
        if asdict(self) | {"weight_hash": ""} != asdict(other) | {"weight_hash": ""}:
            raise SmartKVError(f"{what} are for {other.describe()}, but the model is {self.describe()}")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of each layer, in order."""
    base: Any = model.base_model
    if hasattr(base, "h"):  # GPT-2
        return [block.attn for block in base.h]
    return [block.self_attn for block in base.layers]
