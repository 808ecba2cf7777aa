"""Where each family's key is read, and the line with which other models are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.key_sites import KEY_SITES, REFUSED, refusal
from tests.families import FORMS, make
from tests.models import FAMILIES


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("t5gemma", "has an encoder"),
        ("deepseek_v3", "MLA"),
        ("falcon", "does not go through transformers' attention functions"),
        ("llama4_text", "chunked attention"),
        ("gemma4_text", "differ in head_dim"),
        ("qwen3_5", "load its language model, Qwen3_5ForCausalLM"),
        ("olmo_hybrid", "three states each"),
        ("gemma3", "load its language model, Gemma3ForCausalLM"),
    ],
)
def test_a_family_that_cannot_be_served_is_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(SmartKVError, match=f"model type '{family}' is not supported: .*{reason}"):
        Architecture.of(SimpleNamespace(model_type=family))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "unheard_of", "layer_types": ["mamba", "full_attention"]}, "layers of the kind mamba"),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"]},
            "this qwen2 has layers of the kind chunked_att",
        ),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "reads in both directions"),
    ],
)
def test_a_model_with_other_layers_than_its_family_had_is_refused(config: dict[str, Any], said: str) -> None:
    assert said in str(refusal(SimpleNamespace(**config)))


def test_each_family_was_verified_or_is_refused() -> None:
    verified = {form.split(",")[0] for form in FORMS} | {family.removesuffix("_sliding") for family in FAMILIES}
    assert verified == set(KEY_SITES) and not verified & set(REFUSED)


@pytest.mark.parametrize(
    ("form", "module"), [("cohere", "k_proj"), ("cohere, qk_norm", "k_norm"), ("phi, qk_layernorm", "k_layernorm")]
)
def test_the_site_is_behind_the_norm_where_a_model_has_one(form: str, module: str) -> None:
    model = make(form)
    attention: Any = model.base_model.layers[0].self_attn
    assert KEY_SITES[model.config.model_type].of(attention).module == module


def test_a_family_whose_attention_function_is_not_told_of_its_window_tells_it_here() -> None:
    attention = nn.Module()
    assert KEY_SITES["llama"].own_window(attention) is KEY_SITES["qwen2_moe"].own_window(attention) is None
    attention.sliding_window = 6  # type: ignore[assignment]
    assert KEY_SITES["qwen2_moe"].own_window(attention) == 6
