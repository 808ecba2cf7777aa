"""Saved caches continue bit for bit, and files that do not fit are refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.cache.fixtures import MODELS, recent

POLICY = HybridPolicy((LayerRule("0", "gated", 4), LayerRule("1", "window", 6)), sinks=2, price=0.0, multiple=3.0)


def gates_of(model: PreTrainedModel, seed: int = 1) -> GateBank:
    torch.manual_seed(seed)
    return GateBank(Fingerprint.of(model))


@torch.inference_mode()
def go_on(model: PreTrainedModel, cache: LifespanCache, ids: Tensor) -> Tensor:
    """A chunk, then token by token, past a packing."""
    parts = [model(ids[:, :7], past_key_values=cache).logits]
    parts += [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(7, ids.shape[1])]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("policy", [POLICY, replace(POLICY, max_tokens=20, max_tokens_per="layer")], ids=["", "capped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_cache_goes_on_bit_for_bit(family: str, policy: HybridPolicy, tmp_path: Path) -> None:
    model = MODELS[family]
    if policy.max_tokens is not None and Fingerprint.of(model).kv_heads > 2:
        policy = replace(policy, max_tokens=40)
    gates, prompt, more = gates_of(model), token_ids(60).view(2, 30), token_ids(50, 1).view(2, 25)
    cache = LifespanCache(model, gates, policy, chunk=8, first_query=3)
    with torch.inference_mode():
        model(prompt[:, :29], past_key_values=cache)
        model(prompt[:, 29:], past_key_values=cache)
    save_cache(cache, tmp_path / "prompt.safetensors")
    loaded = load_cache(tmp_path / "prompt.safetensors", model, gates)
    assert loaded.get_seq_length() == 30 and loaded.storage_bytes == cache.storage_bytes
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))
    assert torch.equal(loaded.footprint_by_head, cache.footprint_by_head)
    assert torch.equal(loaded.live_keys, cache.live_keys)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_keys_go_on_bit_for_bit(bits: int, tmp_path: Path) -> None:
    model, prompt, more = MODELS["llama"], token_ids(30)[None], token_ids(25, 1)[None]
    cache = LifespanCache(model, None, recent(9), bits=bits)
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
    save_cache(cache, tmp_path / "c.safetensors")
    loaded = load_cache(tmp_path / "c.safetensors", model)
    assert loaded.bits == bits and loaded.storage_bytes == cache.storage_bytes
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))


def padded(folder: Path) -> tuple[Path, LifespanCache]:
    """The file of a cache of two rows, the first with 3 tokens of padding, and the cache."""
    model, mask = MODELS["llama"], torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache = LifespanCache(model, None, recent(4))
    model(token_ids(24).view(2, 12), attention_mask=mask, past_key_values=cache)
    save_cache(cache, folder / "c.safetensors")
    return folder / "c.safetensors", cache


@pytest.mark.parametrize("early", [False, True])
def test_a_loaded_cache_knows_which_tokens_were_padding(early: bool, tmp_path: Path) -> None:
    """Also from a file of an early version, which has no ids of tokens."""
    path, cache = padded(tmp_path)
    if early:
        tensors, header = load_file(path), header_of(path)
        del tensors["tokens"]
        save_file(tensors, path, metadata={"smartkv_cache": json.dumps(header | {"format_version": 2})})
    loaded = load_cache(path, MODELS["llama"])
    want = [[False] * 3 + [True] * 9, [True] * 12]
    assert loaded.seen_tokens.real(12).tolist() == cache.seen_tokens.real(12).tolist() == want
    with pytest.raises(SmartKVError, match="do not agree which of these are padding"):
        loaded.seen_tokens.check_mask(torch.ones(2, 13), torch.zeros(2, 1))
    if not early:
        assert torch.equal(loaded.seen_tokens.ids, cache.seen_tokens.ids)


def header_of(path: Path) -> dict[str, Any]:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["smartkv_cache"])


def test_values_of_another_width_than_their_keys_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, MODELS["llama"])
    tensors, header = load_file(path), header_of(path)
    tensors["0.value"] = tensors["0.value"][:, :-1].clone()
    save_file(tensors, path, metadata={"smartkv_cache": json.dumps(header)})
    with pytest.raises(SmartKVError, match="layer 0 do not fit together"):
        load_cache(path, MODELS["llama"])


def test_a_centre_of_packed_keys_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, path = MODELS["llama"], tmp_path / "c.safetensors"
    cache = LifespanCache(model, None, recent(9), bits=8)
    model(token_ids(20)[None], past_key_values=cache)
    save_cache(cache, path)
    tensors, header = load_file(path), header_of(path)
    tensors["0.centre"] = tensors["0.centre"][:-1].clone()
    save_file(tensors, path, metadata={"smartkv_cache": json.dumps(header)})
    with pytest.raises(SmartKVError, match="centre of layer 0 does not fit"):
        load_cache(path, model)


def test_a_file_names_its_gates_by_16_hex_digits(tmp_path: Path) -> None:
    path = saved(tmp_path, MODELS["llama"], gates_of(MODELS["llama"]))
    assert re.fullmatch("[0-9a-f]{16}", header_of(path)["gates"])


def test_the_file_holds_the_live_keys_and_little_else(tmp_path: Path) -> None:
    model, cache = MODELS["llama"], LifespanCache(MODELS["llama"], None, recent(16), rollback=0)
    model(token_ids(200)[None], past_key_values=cache)
    save_cache(cache, tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size < cache.live_bytes * 1.2 + 4096


def saved(folder: Path, model: PreTrainedModel, gates: GateBank | None = None) -> Path:
    cache = LifespanCache(model, gates, POLICY if gates else recent(4))
    model(token_ids(20)[None], past_key_values=cache)
    save_cache(cache, folder / "c.safetensors")
    return folder / "c.safetensors"


def test_a_cache_that_saw_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="not seen a token"):
        save_cache(LifespanCache(MODELS["llama"], None, recent(4)), tmp_path / "c.safetensors")


def test_missing_folders_of_a_path_are_made(tmp_path: Path) -> None:
    cache, path = LifespanCache(MODELS["llama"], None, recent(4)), tmp_path / "prompts" / "long" / "cache.safetensors"
    with torch.no_grad():
        MODELS["llama"](token_ids(9)[None], past_key_values=cache)
    save_cache(cache, path)
    assert torch.equal(load_cache(path, MODELS["llama"]).live_keys, cache.live_keys)
    with pytest.raises(SmartKVError, match="could not be written"):
        save_cache(cache, path / "below_a_file")


def test_keys_of_another_architecture_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"(?s)c\.safetensors.*gpt2.*llama"):
        load_cache(saved(tmp_path, MODELS["gpt2"]), MODELS["llama"])


def test_keys_of_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="other weights"):
        load_cache(saved(tmp_path, MODELS["llama"]), llama(seed=5))


def test_keys_in_another_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"float32.*bfloat16"):
        load_cache(saved(tmp_path, MODELS["llama"]), llama().bfloat16())


@pytest.mark.parametrize("seed", [None, 2])
def test_other_gates_are_refused(seed: int | None, tmp_path: Path) -> None:
    model = MODELS["llama"]
    path = saved(tmp_path, model, gates_of(model))
    with pytest.raises(SmartKVError, match="other gates"):
        load_cache(path, model, None if seed is None else gates_of(model, seed))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="cannot be read"):
        load_cache(tmp_path / "none.safetensors", MODELS["llama"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = saved(tmp_path, MODELS["llama"])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SmartKVError, match="damaged"):
        load_cache(path, MODELS["llama"])


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(SmartKVError, match="not a cache"):
        load_cache(tmp_path / "a.safetensors", MODELS["llama"])


@pytest.mark.parametrize("name", ["0.counts", "1.key", "1.seen", "0.position"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_tensors_that_do_not_fit_together_are_refused(name: str, damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path, MODELS["llama"])
    tensors = load_file(path)
    metadata = {"smartkv_cache": json.dumps(header_of(path))}
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(SmartKVError, match="whole cache"):
        load_cache(path, MODELS["llama"])


@pytest.mark.parametrize("other", [None, "prompt", QuantizedCache(MODELS["llama"], "int8"), DynamicCache()])
def test_another_kind_of_cache_is_not_saved(other: Any, tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match="expected a LifespanCache, got"):
        save_cache(other, tmp_path / "prompt.safetensors")


PATH = "the path of a cache's file must be a str or a Path, got "


@pytest.mark.parametrize("path", [3, None, "", ["prompt.safetensors"]])
def test_a_path_of_a_wrong_type_is_refused_with_the_call(path: Any) -> None:
    with pytest.raises(SmartKVError, match=PATH + r".*: write save_cache\(cache, path\)"):
        save_cache(LifespanCache(MODELS["llama"], None, recent(4)), path)
    with pytest.raises(SmartKVError, match=PATH + r".*: write load_cache\(path, model, gates\)"):
        load_cache(path, MODELS["llama"])


def test_swapped_arguments_are_refused_with_their_order(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=PATH + r"a LlamaForCausalLM: write load_cache\(path, model, gates\)"):
        load_cache(MODELS["llama"], tmp_path / "c.safetensors")  # type: ignore[arg-type]
    with pytest.raises(SmartKVError, match=r"save_cache expected a LifespanCache, got '.*c.safetensors'"):
        save_cache(tmp_path / "c.safetensors", LifespanCache(MODELS["llama"], None, recent(4)))  # type: ignore[arg-type]
