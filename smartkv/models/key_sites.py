"""The place in each model family's attention module where the key just before the rotary embedding is read.

A family is listed once a tiny model of it was verified (`docs/families.md`); any other is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import cache_utils

from smartkv.models.wrappers import LINEAR_ATTENTION


def _every_layer(_: nn.Module) -> bool:
    """Say of each layer that it has a rotary embedding."""
    return True


def _told(_: nn.Module) -> None:
    """Return no window: the attention function is told of it."""


@dataclass(frozen=True)
class KeySite:
    """The place in a model family's attention module where the key just before the rotary embedding is read.

    Attributes:
        module: Name of the submodule of the attention module whose output holds the key.
        read: Function of (that output, the attention module) that returns keys `[batch, kv_heads, tokens, head_dim]`.
        rotary: Function of an attention module that says whether its layer applies a rotary embedding after this point.
        projection: Name of the linear submodule whose weights tell models of a family apart.
        otherwise: The site in models of the family whose attention modules have no such submodule. None: all have it.
        norm_after: Name of the submodule that the rotated key goes through. None: there is none.
        own_window: Function of an attention module that returns the layer's sliding window, in tokens, where the model
            does not tell its attention function of it.
        half_angles: Whether the rotary embedding gives each angle once, for the two elements that turn together.
        positions_of_mask: Whether the model reads positions that it was not given out of the mask.
    """

    module: str
    read: Callable[[Tensor, nn.Module], Tensor]
    rotary: Callable[[nn.Module], bool] = _every_layer
    projection: str = "k_proj"
    otherwise: "KeySite | None" = None
    norm_after: str | None = None
    own_window: Callable[[nn.Module], int | None] = _told
    half_angles: bool = False
    positions_of_mask: bool = False

    def of(self, attention: nn.Module) -> "KeySite":
        """Return the site in one attention module: this one, or `otherwise`."""
        return self if self.otherwise is None or hasattr(attention, self.module) else self.otherwise


# -- how a key is read out of a submodule's output ---------------------------------------------------------------------


def _flat(output: Tensor, attention: nn.Module) -> Tensor:
    """Split `[batch, tokens, kv_heads · head_dim]` into heads."""
    return output.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _clipped(output: Tensor, attention: Any) -> Tensor:
    """Split into heads and clip, as OLMo does in place after its projection."""
    limit = attention.config.clip_qkv
    return _flat(output if limit is None else output.clamp(-limit, limit), attention)


def _tokens_first(output: Tensor, _: nn.Module) -> Tensor:
    """Transpose `[batch, tokens, kv_heads, head_dim]`."""
    return output.transpose(1, 2)


def _heads_first(output: Tensor, _: nn.Module) -> Tensor:
    """Return `[batch, kv_heads, tokens, head_dim]` as it is."""
    return output


def _thirds(output: Tensor, attention: nn.Module) -> Tensor:
    """Take the key out of GPT-2's `c_attn`, query, key and value side by side: `[batch, tokens, 3 · hidden]`."""
    return _flat(output.chunk(3, dim=-1)[1], attention)


def _thirds_of_heads(output: Tensor, attention: Any) -> Tensor:
    """Take the key out of GPT-NeoX's `query_key_value`: query, key and value of a head side by side."""
    return output.unflatten(-1, (-1, 3 * attention.head_size)).chunk(3, dim=-1)[1].transpose(1, 2)


def _query_key_value(output: Tensor, attention: Any) -> Tensor:
    """Take the key out of Phi-3's `qkv_proj`: all query heads, then the key heads, then as many value heads."""
    queries = attention.config.num_attention_heads * attention.head_dim
    return _flat(output[..., queries:].chunk(2, dim=-1)[0], attention)


# -- layers that differ ------------------------------------------------------------------------------------------------


def _no_layer(_: nn.Module) -> bool:
    return False


def _flagged(attention: Any) -> bool:
    """SmolLM3: a flag for each layer."""
    return bool(attention.use_rope)


def _sliding(attention: Any) -> bool:
    """Cohere 2: its layers that see everything have no rotary embedding."""
    return attention.sliding_window is not None


def _sliding_or_alike(attention: Any) -> bool:
    """EXAONE 4: the same, unless no layer slides."""
    return attention.sliding_window is None or attention.is_sliding


def _window_of_layer(attention: Any) -> int | None:
    """Qwen2-MoE: an attribute of the layers that slide."""
    return getattr(attention, "sliding_window", None)


def _window_of_config(attention: Any) -> int | None:
    """Phi-MoE: a window of all layers."""
    return attention.config.sliding_window


# -- the families ------------------------------------------------------------------------------------------------------

PROJECTION = KeySite("k_proj", _flat)
NORM = KeySite("k_norm", _tokens_first)
NORM_OF_HEADS = KeySite("k_norm", _heads_first)
NORM_OF_ALL = KeySite("k_norm", _flat)
NORM_OR_PROJECTION = KeySite("k_norm", _tokens_first, otherwise=PROJECTION)
LAYERNORM_OR_PROJECTION = KeySite("k_layernorm", _heads_first, otherwise=PROJECTION)

KEY_SITES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "mixtral", "ministral", "ministral3", "arcee", "seed_oss"), PROJECTION
    ),
    **dict.fromkeys(("gemma", "granite", "granitemoe", "starcoder2", "nemotron"), PROJECTION),
    **dict.fromkeys(("gemma2", "vaultgemma"), PROJECTION),  # cap their scores
    "gpt_oss": KeySite("k_proj", _flat, half_angles=True),  # its softmax has learned sinks
    **dict.fromkeys(("glm", "glm4", "ernie4_5", "helium"), PROJECTION),  # rotate pairs of neighbours
    **dict.fromkeys(("qwen3", "qwen3_moe"), NORM),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), NORM),  # with layers of linear attention
    **dict.fromkeys(("apertus", "gemma3_text"), NORM_OF_HEADS),
    **dict.fromkeys(("olmo2", "olmo3"), NORM_OF_ALL),
    **dict.fromkeys(("cohere", "glm4_moe"), NORM_OR_PROJECTION),
    **dict.fromkeys(("phi", "stablelm"), LAYERNORM_OR_PROJECTION),
    "cohere2": KeySite("k_proj", _flat, rotary=_sliding),
    "exaone4": KeySite("k_norm", _heads_first, rotary=_sliding_or_alike),
    "gpt2": KeySite("c_attn", _thirds, rotary=_no_layer, projection="c_attn"),
    "gpt_neox": KeySite("query_key_value", _thirds_of_heads, projection="query_key_value"),
    "hunyuan_v1_dense": KeySite("k_proj", _flat, norm_after="key_layernorm"),
    "olmo": KeySite("k_proj", _clipped),
    "opt": KeySite("k_proj", _flat, rotary=_no_layer, positions_of_mask=True),
    "phi3": KeySite("qkv_proj", _query_key_value, projection="qkv_proj"),
    "phimoe": KeySite("k_proj", _flat, own_window=_window_of_config),
    "qwen2_moe": KeySite("k_proj", _flat, own_window=_window_of_layer),
    "smollm3": KeySite("k_proj", _flat, rotary=_flagged),
}

# -- what cannot be served ---------------------------------------------------------------------------------------------

LATENT = "it stores one compressed key for all heads (MLA)"
BY_ITSELF = "its attention does not go through transformers' attention functions, where a cache could take part"
REFUSED = {
    **dict.fromkeys(("falcon", "bloom", "mpt", "gpt_neo"), BY_ITSELF),
    "t5gemma": "it has an encoder, whose keys its decoder reads",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "minicpm3"), LATENT),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), "its layers differ in head_dim"
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "some of its layers read the keys of another layer"),
    **dict.fromkeys(("llama4", "llama4_text"), "some of its layers attend within blocks of tokens (chunked attention)"),
    "olmo_hybrid": "its layers of linear attention have three states each, which was not verified",
    "gemma3": "it reads pictures too: load its language model, Gemma3ForCausalLM",
    "qwen3_5": "it reads pictures too: load its language model, Qwen3_5ForCausalLM",
    "qwen3_5_moe": "it reads pictures too: load its language model, Qwen3_5MoeForCausalLM",
    "mistral3": "it reads pictures too: load its language model",
}
ALIKE = {"full_attention", "sliding_attention"}  # kinds of layers that a cache of keys can serve
HYBRID = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}  # some of their layers have linear attention
# an earlier cache of transformers holds their states in a class of its own, or loses them between two prompts
HOLDS_STATES = hasattr(getattr(cache_utils, "LinearAttentionLayer", None), "activate_past_recording")


def refusal(config: Any) -> str | None:
    """Return why models with this transformers config cannot be served; None: they can."""
    family = config.model_type
    if family in REFUSED:
        return f"model type '{family}' is not supported: {REFUSED[family]}"
    kinds = set(getattr(config, "layer_types", None) or ()) - ALIKE
    if family in HYBRID:
        kinds.discard(LINEAR_ATTENTION)
        if not HOLDS_STATES:
            return (
                f"model type '{family}' is not supported in transformers {transformers.__version__}, whose caches do "
                "not hold the states of linear attention as later ones do: use 5.17 or newer"
            )
    if family not in KEY_SITES and kinds:
        return f"model type '{family}' is not supported: it has layers of the kind {', '.join(sorted(kinds))}"
    if family not in KEY_SITES:
        return f"model type '{family}' is not supported: expected one of {', '.join(sorted(KEY_SITES))}"
    if kinds:
        return f"this {family} has layers of the kind {', '.join(sorted(kinds))}, which is not supported"
    if getattr(config, "use_bidirectional_attention", False):
        return f"this {family} reads in both directions (use_bidirectional_attention): a KV cache is for one"
    return None
