"""Loading a frozen LM, its architecture and its fingerprint."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import FalconConfig

from smartkv.errors import SmartKVError
from smartkv.models import backbone as backbone_module
from smartkv.models.architecture import Fingerprint
from smartkv.models.backbone import count_parameters, load_backbone, load_tokenizer, read_architecture, resolve_dtype
from tests.models import FAMILIES, save_tiny_backbone, tiny_tokenizer


def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(SmartKVError, match="'falcon' is not supported"):
        load_backbone(str(tmp_path))


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


@pytest.mark.parametrize(
    ("name", "advice"), [("smollm2", "did you mean 'smollm2-135m'?"), ("nobody/model", "give a hub id")]
)
def test_a_hub_that_does_not_answer_is_told_at_once(
    name: str, advice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(SmartKVError, match=r"not downloaded before, and the hub does not answer: .*refused") as refusal:
        load_backbone(name)
    assert time.monotonic() - start < 2 and caplog.text == "" and advice in str(refusal.value)


def test_paths_and_files_are_never_taken_for_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "hub_trouble", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").touch()
    for name in (Path("nobody/model"), "./model", "runs/no/model", "~/gone"):
        with pytest.raises(SmartKVError, match=f"model '{name}' could not be loaded: there is no such folder"):
            load_backbone(name)  # type: ignore[arg-type]
    with pytest.raises(SmartKVError, match=r"model 'model\.bin' is a file: give its folder"):
        load_backbone("model.bin")


def test_a_folder_may_be_given_as_a_path(tiny_backbone: Path) -> None:
    assert load_backbone(tiny_backbone).architecture == load_backbone(str(tiny_backbone)).architecture  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, "", 3])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(SmartKVError, match=r"model must be a hub id, a local folder, a \.gguf file or .*, got "):
        load_backbone(name)


def test_a_folder_with_cut_off_weights_is_refused_by_name(tmp_path: Path) -> None:
    weights = save_tiny_backbone(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SmartKVError, match=tmp_path.name):
        load_backbone(str(tmp_path))


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fingerprint_does_not_depend_on_the_dtype_loaded(dtype: str, tiny_backbone: Path) -> None:
    backbone = load_backbone(str(tiny_backbone), dtype=dtype)
    assert backbone.model.dtype == getattr(torch, dtype)
    assert backbone.fingerprint == Fingerprint.of(load_backbone(str(tiny_backbone), dtype="float32").model)


def test_dtype_names_are_torchs_own() -> None:
    assert [resolve_dtype(name) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ["int8", "fp32", "", "torch.float32"])
def test_an_unknown_dtype_is_refused_with_those_known(name: str) -> None:
    with pytest.raises(SmartKVError, match=f"'{name}'.*auto, float32, bfloat16, float16"):
        resolve_dtype(name)


def test_a_quantised_model_without_its_package_says_which_is_missing(tmp_path: Path) -> None:
    path = save_tiny_backbone(tmp_path) / "config.json"
    quantised = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(SmartKVError, match=rf"model '{tmp_path}' could not be loaded: .*torchao"):
        load_backbone(str(tmp_path))


def test_a_model_that_cannot_be_moved_is_named(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("`.to` is not supported for `8-bit` models.")

    monkeypatch.setattr("transformers.LlamaForCausalLM.to", refuse)
    with pytest.raises(SmartKVError, match=r"cannot be moved to cpu: `\.to` is not supported"):
        load_backbone(str(tiny_backbone))


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the latter ties its embeddings
def test_parameters_are_counted_without_weights(family: str, tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path, family)
    expected = sum(parameter.numel() for parameter in load_backbone(str(tmp_path), "float32").model.parameters())
    (tmp_path / "model.safetensors").unlink()
    assert count_parameters(str(tmp_path)) == expected
