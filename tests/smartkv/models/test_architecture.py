"""The architecture, fingerprint and key site of each family."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, Fingerprint, attention_modules
from smartkv.models.key_sites import KEY_SITES
from tests.models import FAMILIES, llama

QWEN25 = Qwen2Config(
    num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, hidden_size=896, intermediate_size=4864
)
QWEN3 = Qwen3Config(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, hidden_size=1024)
SMOLLM2 = LlamaConfig(
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536
)
PUBLISHED = [
    pytest.param(QWEN25, 48, 64, id="qwen2.5-0.5b"),
    pytest.param(QWEN3, 224, 128, id="qwen3-0.6b"),
    pytest.param(SMOLLM2, 90, 64, id="smollm2-135m"),
]


@pytest.mark.parametrize(("family", "kv_heads", "head_dim"), [
    ("llama", 2, 8), ("qwen2", 2, 8), ("qwen3", 2, 12), ("mistral", 2, 8), ("mistral_sliding", 2, 8), ("gpt2", 4, 8),
])  # fmt: skip
def test_architecture_is_read_from_each_family(family: str, kv_heads: int, head_dim: int) -> None:
    model = FAMILIES[family]()
    expected = Architecture(family.removesuffix("_sliding"), 2, 4, kv_heads, head_dim, 256)
    assert Architecture.of(model.config) == expected


@pytest.mark.parametrize(("config", "gates", "head_dim"), PUBLISHED)
def test_published_shapes_have_their_number_of_gates(config: PreTrainedConfig, gates: int, head_dim: int) -> None:
    architecture = Architecture.of(config)
    assert (architecture.gates, architecture.head_dim) == (gates, head_dim)


@pytest.mark.parametrize(("config", "gates", "head_dim"), PUBLISHED)
def test_gates_are_as_many_as_key_heads_of_the_real_modules(
    config: PreTrainedConfig, gates: int, head_dim: int
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    widths = [module.get_submodule("k_proj").out_features for module in attention_modules(model)]
    assert sum(width // head_dim for width in widths) == gates


@pytest.mark.parametrize(("config", "gates", "head_dim"), PUBLISHED)
def test_a_bank_for_a_published_shape_holds_its_gates(config: PreTrainedConfig, gates: int, head_dim: int) -> None:
    shape = Architecture.of(config)
    bank = GateBank(Fingerprint(shape.model_type, shape.layers, shape.kv_heads, shape.head_dim, ""))
    assert len(bank) == gates
    assert len(bank.heads) == len(set(bank.heads)) == gates
    assert bank.weight1.shape == (gates, head_dim, 64)


def test_an_unsupported_family_is_refused_by_name_with_those_supported() -> None:
    with pytest.raises(SmartKVError) as error:
        Architecture.of(GPTJConfig())
    assert "gptj" in str(error.value)
    assert all(family in str(error.value) for family in KEY_SITES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_the_same_in_float32_and_bfloat16(family: str) -> None:
    model = FAMILIES[family]()
    wide = Fingerprint.of(model)
    assert Fingerprint.of(model.to(torch.bfloat16)) == wide


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_hash_tells_other_weights_apart(family: str) -> None:
    first, second = Fingerprint.of(FAMILIES[family](seed=0)), Fingerprint.of(FAMILIES[family](seed=1))
    assert first.weight_hash != second.weight_hash


def test_check_names_both_architectures_and_what_was_checked() -> None:
    model, shards = Fingerprint("llama", 30, 3, 64, "a"), Fingerprint("qwen2", 24, 2, 96, "a")
    with pytest.raises(SmartKVError) as error:
        model.check(shards, "the shards in runs/x")
    for part in (model.describe(), shards.describe(), "the shards in runs/x"):
        assert part in str(error.value)
    assert all(part in model.describe() for part in ("llama", "30", "3 KV heads", "64"))


@pytest.mark.parametrize("field", ["model_type", "layers", "kv_heads", "head_dim"])
def test_check_refuses_a_difference_in_each_part_of_the_architecture(field: str) -> None:
    parts = {"model_type": "llama", "layers": 30, "kv_heads": 3, "head_dim": 64, "weight_hash": "a"}
    other = parts | {field: "qwen2" if field == "model_type" else 7}
    with pytest.raises(SmartKVError):
        Fingerprint(**parts).check(Fingerprint(**other), "it")


def test_check_accepts_other_weights_of_the_same_architecture() -> None:
    Fingerprint("llama", 30, 3, 64, "a").check(Fingerprint("llama", 30, 3, 64, "b"), "it")


def test_attention_that_no_registered_function_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.delattr("transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS")
    with pytest.raises(SmartKVError, match="LlamaAttention of this llama computes attention by itself"):
        attention_modules(model)
