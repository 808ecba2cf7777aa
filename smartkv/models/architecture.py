"""The shape of a model's KV cache, and the model's fingerprint."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.io.checks import describe
from smartkv.models.key_sites import KEY_SITES, refusal
from smartkv.models.rotary import longest_sequence
from smartkv.models.weight_hash import weight_hash
from smartkv.models.wrappers import LINEAR_ATTENTION, attention_blocks, language_model, self_attention


@dataclass(frozen=True)
class Architecture:
    """The shape of a model's KV cache, and its number of positions.

    Attributes:
        model_type: The family, as in a transformers config: one of `KEY_SITES`.
        layers: Number of layers with attention; those with linear attention store no keys, and do not count anywhere.
        query_heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        head_dim: Dimensions of a head.
        max_positions: Tokens of the longest sequence that the model was made for (see `longest_sequence`).
        sliding_windows: The model's own window in each layer, in tokens, None where a layer sees everything. Empty
            unless the model has both kinds of layers.
    """

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    sliding_windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, config: Any) -> "Architecture":
        """Read a transformers config.

        Raises:
            SmartKVError: This is no config, or the model cannot be served (see `refusal`).
        """
        if not isinstance(getattr(config, "model_type", None), str):
            raise SmartKVError(
                f"expected the config of a transformers model, got {describe(config)}: give model.config"
            )
        if reason := refusal(config):
            raise SmartKVError(reason)
        layers = config.num_hidden_layers - _kinds(config).count(LINEAR_ATTENTION)
        if layers < 1:
            raise SmartKVError(f"this {config.model_type} has no layer with attention, so it stores no keys")
        query_heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            layers=layers,
            query_heads=query_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
            max_positions=longest_sequence(config),
            sliding_windows=_sliding_windows(config),
        )

    @property
    def gated_layers(self) -> list[int]:
        """The layers whose keys gates judge: all, or those that see everything where the others slide."""
        return gated_layers(self.layers, self.sliding_windows)

    @property
    def gates(self) -> int:
        """Number of gates: one for each KV head of each of the `gated_layers`."""
        return len(self.gated_layers) * self.kv_heads

    def keys_of_full_cache(self, tokens: int) -> int:
        """Return how many keys a full cache holds after a sequence of `tokens`, over layers and KV heads."""
        windows = self.sliding_windows or [None] * self.layers
        return self.kv_heads * sum(min(tokens, own or tokens) for own in windows)


def gated_layers(layers: int, sliding_windows: Sequence[int | None]) -> list[int]:
    """Return the layers whose keys gates judge, ascending.

    Args:
        layers: Number of layers of the model.
        sliding_windows: As in `Architecture`.
    """
    return [layer for layer in range(layers) if not sliding_windows or sliding_windows[layer] is None]


def _kinds(config: Any) -> list[str]:
    """Return the kind of each layer, as a transformers config names it; empty if all are alike."""
    return list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]


def _sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Return `Architecture.sliding_windows` of a transformers config."""
    kinds = [kind for kind in _kinds(config) if kind != LINEAR_ATTENTION]
    window = config.sliding_window if getattr(config, "use_sliding_window", True) and len(set(kinds)) > 1 else None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds) if window else ()


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a model, stored in the shards and gates that were made from it.

    The first four fields must be equal for a model to use them. A different `weight_hash` only warns, because a tuned
    or quantised copy of a model may use its gates. So does an empty one, of weights that cannot be read.

    Attributes:
        model_type: The family, as in a transformers config.
        layers: Number of layers.
        kv_heads: KV heads of a layer.
        head_dim: Dimensions of a head.
        weight_hash: 16 hexadecimal digits of a SHA-256 over layer 0's key projection (GPT-2, GPT-NeoX and Phi-3: their
            fused projection of query, key and value), see `smartkv.models.weight_hash`. Empty if its weights cannot be
            read.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    weight_hash: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Fingerprint":
        """Compute the fingerprint of a loaded model.

        Args:
            model: A causal LM, or a wrapper of one (see `language_model`).

        Raises:
            SmartKVError: This is no model, or its family is not supported.
        """
        arch, lm = check_model(model), language_model(model)
        projection = getattr(attention_modules(lm)[0], KEY_SITES[arch.model_type].projection, None)
        digest = "" if projection is None else weight_hash(projection)
        return cls(arch.model_type, arch.layers, arch.kv_heads, arch.head_dim, digest)

    def describe(self) -> str:
        """Return the architecture in words, for messages."""
        return f"{self.model_type}, {self.layers} layers × {self.kv_heads} KV heads × {self.head_dim} dims"

    def check(self, other: "Fingerprint", what: str) -> None:
        """Raise an error if `other` has another architecture than this fingerprint.

        Args:
            other: Fingerprint of the thing that is checked.
            what: Name of that thing in the message, in the plural: "the shards in runs/x".

        Raises:
            SmartKVError: The architectures differ. The message names both.
        """
        if asdict(self) | {"weight_hash": ""} != asdict(other) | {"weight_hash": ""}:
            raise SmartKVError(f"{what} are for {other.describe()}, but the model is {self.describe()}")


def check_model(model: Any) -> Architecture:
    """Return the architecture of a loaded model, or of the one that a wrapper holds (see `language_model`).

    Raises:
        SmartKVError: `model` is something else (a name, a tokenizer, …), or a model of a family that is not supported.
    """
    if isinstance(model, PreTrainedModel):
        Architecture.of(model.config)  # raises for an unsupported family, which may have no decoder
    if isinstance(model, nn.Module) and any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return Architecture.of(language_model(model).config)
    advice = "load one with AutoModelForCausalLM.from_pretrained(…)"
    if isinstance(model, str | Path):
        advice = f"load it with AutoModelForCausalLM.from_pretrained('{model}')"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a Backbone, a pipeline, a Trainer
        advice = "give its attribute .model"
    elif isinstance(model, PreTrainedTokenizerBase):
        advice = "give the model that this tokenizer belongs to"
    raise SmartKVError(f"model must be a loaded transformers model, got {describe(model)}: {advice}")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention module of each layer that has one, in order.

    Args:
        model: A model, or a wrapper of one (see `language_model`).

    Raises:
        SmartKVError: A module is hidden in another one, or the modules compute attention by themselves and would never
            call a registered function.
    """
    lm = language_model(model)
    modules = [self_attention(block) for block in attention_blocks(lm)]
    for layer, module in enumerate(modules):
        if "config" not in module.__dict__:
            raise SmartKVError(
                f"the attention of layer {layer} is in a {type(module).__name__}, which SmartKV does not look into: "
                "use the model without this wrapper (peft: leave attention out of modules_to_save)"
            )
    if not hasattr(sys.modules[type(modules[0]).forward.__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise SmartKVError(
            f"the {type(modules[0]).__name__} of this {lm.config.model_type} computes attention by itself, and not "
            f"through transformers' attention functions: use the model's own classes of a newer transformers than "
            f"{transformers.__version__}"
        )
    return modules
