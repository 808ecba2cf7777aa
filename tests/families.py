"""Tiny random models of every family beyond `tests.models.FAMILIES`, in each form that changes how keys are read.

`python -m tests.families` prints the table of docs/families.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture, attention_modules
from smartkv.models.key_sites import HOLDS_STATES, KEY_SITES
from smartkv.models.rotary import Rotation
from smartkv.models.wrappers import linear_attention_modules
from tests.models import FAMILIES, SHAPE, build, tiny_tokenizer

# what differs from SHAPE, by the name of the config's class without "Config"; a form's name follows the family's
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 2}
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
WHOLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
SCALED_QUERIES = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.1,
    }
}
SCALED = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
    }
}
QWEN_EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 1],
    },
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", PLAIN),
    "arcee": ("Arcee", {}),
    "cohere": ("Cohere", {"logit_scale": 1.0}),
    "cohere, qk_norm": ("Cohere", {"logit_scale": 1.0, "use_qk_norm": True}),
    "cohere2, sliding": ("Cohere2", {"logit_scale": 1.0, **MIXED}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8}),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone4, sliding": ("Exaone4", {"sliding_window_pattern": "LG", **MIXED}),
    "gemma": ("Gemma", {"head_dim": 12}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 12, "attn_logit_softcapping": 0.5, "layer_types": ["full_attention"] * 2},
    ),
    "gemma2, sliding": (
        "Gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.5, **MIXED},
    ),
    "gemma3_text, sliding": ("Gemma3Text", {"head_dim": 12, "query_pre_attn_scalar": 20, **MIXED}),
    "glm": ("Glm", {"head_dim": 8, "pad_token_id": 0, **PARTIAL}),
    "glm4": ("Glm4", {"head_dim": 8, "attention_bias": True, "pad_token_id": 0, **PARTIAL}),
    "glm4_moe": (
        "Glm4Moe",
        {"head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **PARTIAL},
    ),
    "glm4_moe, qk_norm": (
        "Glm4Moe",
        {"head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"use_qk_norm": True, "first_k_dense_replace": 0, **PARTIAL},
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 8, "layer_types": ["full_attention"] * 2, **PLAIN, **EXPERTS},
    ),
    "gpt_oss, sliding": ("GptOss", {"head_dim": 8, **SCALED, **MIXED, **EXPERTS}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4, **PARTIAL}),
    "gpt_neox, whole rotary": ("GPTNeoX", {"num_key_value_heads": 4, "use_parallel_residual": False, **WHOLE}),
    "granite": ("Granite", {"attention_multiplier": 0.7, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "granitemoe": ("GraniteMoe", {"attention_multiplier": 0.7, **EXPERTS}),
    "helium": ("Helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 8}),
    "ministral, sliding": ("Ministral", {"head_dim": 12, **MIXED}),
    "ministral3": ("Ministral3", {"head_dim": 12, "sliding_window": None, **SCALED_QUERIES}),
    "mixtral": ("Mixtral", EXPERTS),
    "mixtral, sliding": ("Mixtral", {"sliding_window": 6, **EXPERTS}),
    "nemotron": ("Nemotron", {"head_dim": 8}),
    "olmo": ("Olmo", {}),
    "olmo, clipped": ("Olmo", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2", {}),
    "olmo3, sliding": ("Olmo3", MIXED),
    "opt": ("OPT", {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "opt, norm after": (
        "OPT",
        {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.2}
        | {"do_layer_norm_before": False},
    ),
    "phi": ("Phi", {}),
    "phi, qk_layernorm": ("Phi", {"qk_layernorm": True}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3, sliding": ("Phi3", {"pad_token_id": 0, "sliding_window": 6, **PARTIAL}),
    "phimoe": ("Phimoe", EXPERTS),
    "phimoe, sliding": ("Phimoe", {"sliding_window": 6, **EXPERTS}),
    "qwen2, sliding": ("Qwen2", {"use_sliding_window": True, **MIXED}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "qwen2_moe, sliding": (
        "Qwen2Moe",
        {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "use_sliding_window": True, **MIXED},
    ),
    "qwen3, sliding": ("Qwen3", {"head_dim": 12, "use_sliding_window": True, **MIXED}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12},
    ),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", QWEN_EXPERTS | LINEAR | {"num_attention_heads": 2}),
    "qwen3_5_text": ("Qwen3_5Text", LINEAR),
    "qwen3_next": ("Qwen3Next", QWEN_EXPERTS | LINEAR),
    "seed_oss": ("SeedOss", {"head_dim": 12}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "smollm3, sliding": (
        "SmolLM3",
        {"no_rope_layers": [0, 1], "pad_token_id": 0, "use_sliding_window": True, **MIXED},
    ),
    "stablelm": ("StableLm", PARTIAL),
    "stablelm, qk_layernorm": ("StableLm", {"qk_layernorm": True, **PARTIAL}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "vaultgemma, sliding": ("VaultGemma", {"head_dim": 12, "attn_logit_softcapping": 0.5, **MIXED}),
}
OWN_SOFTMAX = ("gemma2", "gpt_oss")  # a cap on the scores, learned sinks


def make(form: str, **sizes: Any) -> PreTrainedModel:
    """A tiny random model; the test is skipped where this transformers lacks its class."""
    if form in FAMILIES:
        return FAMILIES[form]()
    name, changes = FORMS[form]
    config: Callable[..., Any] | None = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this transformers has no {name}Config")
    if "linear_attention" in changes.get("layer_types", ()) and not HOLDS_STATES:
        pytest.skip("this transformers holds the states of linear attention elsewhere")
    model = build(config(**SHAPE | changes | sizes), seed=0)
    if "attn_logit_softcapping" in changes:  # transformers 5.2 chose sdpa, which ignores the cap
        model.set_attn_implementation("eager")
    try:
        attention_modules(model)
    except SmartKVError:
        if name != "Nemotron":  # in transformers 5.2 it had attention functions of its own
            raise
        pytest.skip("this transformers computes the attention of Nemotron by itself")
    return model


def save_family(folder: Path, form: str) -> Path:
    """A local folder that `load_backbone` takes: a tiny model of 256 positions and a tokenizer for any text."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    make(form, vocab_size=264, bos_token_id=end, eos_token_id=end).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """The window of each layer, by the config alone."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    kinds = [kind for kind in kinds if kind != "linear_attention"]
    window = getattr(config, "sliding_window", None) or None
    return [window if kind == "sliding_attention" else None for kind in kinds]


# -- the table of docs/families.md -------------------------------------------------------------------------------------


def table() -> str:
    """The rows, read from the tiny models themselves."""
    forms: dict[str, list[str]] = {}
    for form in (*FAMILIES, *FORMS):
        family, _, variant = form.replace("_sliding", ", sliding").partition(", ")
        forms.setdefault(family, []).append(variant or "plain")
    rows = ["| family | key | rotary embedding | layers with gates | verified |", "|---|---|---|---|---|"]
    for family, variants in sorted(forms.items()):
        models = [make(_form(family, variant)) for variant in variants]
        sites = dict.fromkeys(KEY_SITES[family].of(attention_modules(model)[0]).module for model in models)
        turned = "; ".join(dict.fromkeys(_turned(model) for model in models))
        some = any(Architecture.of(model.config).sliding_windows for model in models)
        gated = "all; where some slide, the others" if some else "all"
        if linear_attention_modules(models[0]):
            gated = "those without linear attention"
        keys = " or ".join(f"`{module}`" for module in sites)
        rows.append(f"| `{family}` | {keys} | {turned} | {gated} | {', '.join(variants)} |")
    return "\n".join(rows)


def _form(family: str, variant: str) -> str:
    if variant == "plain":
        return family
    return "mistral_sliding" if (family, variant) == ("mistral", "sliding") else f"{family}, {variant}"


def _turned(model: PreTrainedModel) -> str:
    """Which elements of a head turn together, and in which layers."""
    rotations = [Rotation(model, layer) for layer in range(Architecture.of(model.config).layers)]
    turning = [each for each in rotations if each.embedding is not None]
    if not turning:
        return "none"
    width = Architecture.of(model.config).head_dim
    moved = turning[0].rotate(torch.eye(width)[:1], torch.tensor([1]))[0].nonzero().flatten().tolist()
    cos, _ = turning[0].cos_sin(torch.tensor([1])) or ()
    words = "neighbours" if moved == [0, 1] else "halves"
    words += " of a part" if cos.shape[-1] < width else ""
    words += ", then a norm" if turning[0].normed_after else ""
    return words + (" in some layers" if len(turning) < len(rotations) else "")


if __name__ == "__main__":
    print(table())
