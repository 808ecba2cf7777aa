"""Configs, policies, manifests, gates and shards with anything in them: they are read, or refused by our own error."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smartkv import GateBank, HybridPolicy, LayerRule, LifespanCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.policies.budgets import policy_of
from smartkv.shards.manifest import MANIFEST, Manifest, RowBlock
from smartkv.shards.reader import ShardReader
from smartkv.shards.shard_file import read_header
from tests.models import llama, token_ids, write_tiny_shards

MODEL = llama()
many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["all", "gated", "window", "../x", "0-2", "inf", "nan", "9999999999"]),
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON content, the whole of it first."""
    found = [so_far]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*so_far, key))
    return found


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The content with another value at a place; the value ... takes it out."""
    if not place:
        return None if value is ... else value
    content = copy.deepcopy(content)
    at = content
    for key in place[:-1]:
        at = at[key]
    if value is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return content


def mutated(data: st.DataObject, content: Any) -> Any:
    """One to three changes."""
    for _ in range(data.draw(st.integers(1, 3))):
        content = changed(content, data.draw(st.sampled_from(places(content))), data.draw(anything | st.just(...)))
    return content


def harmed(data: st.DataObject, original: bytes) -> bytes:
    """Bytes changed, cut off, doubled or put in."""
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(
            st.integers(0, max(0, len(content) - 1)) | st.integers(0, 200).map(lambda p: min(p, len(content) - 1))
        )
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "drop"]))
        if kind == "set" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=9))
        elif content:
            del content[place : place + data.draw(st.integers(1, 9))]
        if not content:
            break
    return bytes(content)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    policy = HybridPolicy((LayerRule("all", "gated", 8),), sinks=2)
    details = {"ages": [8, 24], "policy": policy.to_dict(), "prices": [[0.1, 0.0], [0.9, 0.0]], "target": "log worth"}
    GateBank(Fingerprint.of(MODEL), None, 8, 2, details).save_pretrained(folder)
    return folder


def used(folder: Path) -> None:
    """What a user does with gates that load."""
    bank = GateBank.from_pretrained(folder, MODEL)
    policy = (
        policy_of(bank, 0.5) if bank.details.get("policy") else HybridPolicy((LayerRule("all", "gated", 4, price=0.0),))
    )
    with LifespanCache(MODEL, bank, policy) as cache, torch.inference_mode():
        MODEL(token_ids(12)[None], past_key_values=cache)


@many
@given(data=st.data())
def test_a_config_of_gates(data: st.DataObject, gates: Path, tmp_path: Path) -> None:
    content = json.loads((gates / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((gates / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(mutated(data, content)))
    try:
        used(tmp_path)
    except SmartKVError as error:
        assert str(error)


@many
@given(data=st.data())
def test_weights_of_gates(data: st.DataObject, gates: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((gates / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(harmed(data, (gates / "model.safetensors").read_bytes()))
    try:
        GateBank.from_pretrained(tmp_path)
    except SmartKVError as error:
        assert str(error)


POLICY = {
    "name": "mine",
    "sinks": 4,
    "price": 0.5,
    "multiple": 2.0,
    "window_share": 0.6,
    "max_tokens": 512,
    "max_tokens_per": "head",
    "rules": [
        {"layers": "0", "rule": "window", "window": 8},
        {"layers": "1", "rule": "gated", "window": 4, "price": 0.1},
    ],
}


def test_what_is_changed_can_be_read_unchanged() -> None:
    """Or every case below would be refused for the same reason."""
    HybridPolicy.from_dict(POLICY).check(Architecture.of(MODEL.config), GateBank(Fingerprint.of(MODEL)))


@many
@given(data=st.data())
def test_a_policy(data: st.DataObject) -> None:
    try:
        policy = HybridPolicy.from_dict(mutated(data, POLICY))
        policy.check(Architecture.of(MODEL.config), GateBank(Fingerprint.of(MODEL)))
    except SmartKVError as error:
        assert str(error)


@many
@given(data=st.data())
def test_a_manifest(data: st.DataObject, made: Path) -> None:
    original = (made / "original.json").read_text()
    (made / MANIFEST).write_text(json.dumps(mutated(data, json.loads(original))))
    try:
        manifest = Manifest.read(made)
        for split in ("train", "validation"):
            manifest.labelled(split, 8, manifest.spec.follow_up)
    except SmartKVError as error:
        assert str(error)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_shards(tmp_path_factory.mktemp("made") / "shards").folder
    (folder / "original.json").write_bytes((folder / MANIFEST).read_bytes())
    return folder


@many
@given(data=st.data())
def test_a_shard(data: st.DataObject, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(harmed(data, next(made.glob("train-*.safetensors")).read_bytes()))
    try:
        read_header(path)
        ShardReader(tmp_path).read(RowBlock(path.name, 0, 0, 4), "keys")
    except SmartKVError as error:
        assert str(error)


@many
@given(data=st.data())
def test_a_saved_cache(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(harmed(data, saved.read_bytes()))
    try:
        load_cache(path, MODEL)
    except SmartKVError as error:
        assert str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    with LifespanCache(MODEL, None, HybridPolicy((LayerRule("all", "window", 6),))) as cache, torch.inference_mode():
        MODEL(token_ids(20)[None], past_key_values=cache)
        save_cache(cache, path)
    return path
