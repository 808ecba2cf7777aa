"""Arguments of the caches: names, files and shares become gates and policies, anything else is refused in a line."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.arguments import resolve_arguments
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.models.backbone import Backbone
from smartkv.policies.arguments import resolve_gates
from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from tests.models import tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import GATED, MODELS, fed, random_gates, recent, state

MODEL = MODELS["llama"]
OPEN = HybridPolicy((LayerRule("all", "gated", 3),), sinks=1)


def gates_with_prices() -> GateBank:
    """Gates of `MODEL` that remember a policy, with prices for footprints from 0.25 to 0.5."""
    torch.manual_seed(1)
    details = {"policy": OPEN.to_dict(), "prices": [[0.5, -0.1], [0.25, 0.1]]}
    return GateBank(Fingerprint.of(MODEL), details=details)


def backbone() -> Backbone:
    return Backbone("tiny", MODEL, tiny_tokenizer(), Fingerprint.of(MODEL), Fingerprint.of(MODEL))  # type: ignore[arg-type]


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_gates_of_a_folder_are_those_that_were_saved_there(kind: type, tmp_path: Path) -> None:
    gates, ids = gates_with_prices(), token_ids(24)[None]
    gates.save_pretrained(tmp_path)
    real = torch.ones_like(ids, dtype=torch.bool)
    want = fed(MODEL, LifespanCache(MODEL, gates, GATED), ids, real, [9])
    got = fed(MODEL, LifespanCache(MODEL, kind(tmp_path), GATED), ids, real, [9])
    assert torch.equal(got, want)


def test_loaded_gates_move_to_the_models_device(tmp_path: Path) -> None:
    random_gates(MODEL).save_pretrained(tmp_path)
    gates = resolve_gates(deepcopy(MODEL).to("meta"), tmp_path)
    assert gates is not None and gates.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("smollm2-135m-instruct", "30 layers × 3 KV heads"), ("qwen2.5-coder-0.5b-instruct", "24 layers × 2 KV heads")],
)
def test_gates_by_name_are_those_that_come_with_smartkv(name: str, shape: str) -> None:
    with pytest.raises(SmartKVError, match=rf"{shape} .* but the model is llama, 2 layers"):
        LifespanCache(MODEL, name, footprint=0.25)


def test_an_adaptive_cache_and_load_cache_take_gates_of_a_folder_too(tmp_path: Path) -> None:
    gates = gates_with_prices()
    gates.save_pretrained(tmp_path / "gates")
    adaptive = AdaptiveCache(MODEL, tmp_path / "gates")
    assert adaptive.gates is not None and torch.equal(adaptive.gates.weight1, gates.weight1)
    adaptive.detach()
    with LifespanCache(MODEL, gates, GATED) as cache, torch.no_grad():
        MODEL(token_ids(8)[None], past_key_values=cache)
        save_cache(cache, tmp_path / "cache.safetensors")
    loaded = load_cache(tmp_path / "cache.safetensors", MODEL, str(tmp_path / "gates"))
    assert torch.equal(loaded.live_keys, cache.live_keys)


# -- a policy or a footprint ------------------------------------------------------------------------------------------


def test_a_footprint_alone_is_the_policy_that_the_gates_remember_with_a_price_that_floats() -> None:
    gates = gates_with_prices()
    for footprint in (0.25, 0.4, numpy.float32(0.5), 0.9, 1):
        policy = LifespanCache(MODEL, gates, footprint=footprint).policy  # type: ignore[arg-type]
        assert policy == replace(policy_of(gates, 0.25), price=None)
    with_price = LifespanCache(MODEL, gates, policy_of(gates, 0.25))
    assert with_price.budget is None and with_price.policy.price is not None


def test_gates_that_remember_no_policy_gate_every_layer() -> None:
    cache = LifespanCache(MODEL, random_gates(MODEL), footprint=0.3)
    assert [(rule.rule, rule.window) for rule in cache.rules] == [("gated", 16)] * 2


def test_a_policy_may_be_an_object_a_name_or_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "recent.yaml"
    file.write_text(yaml.safe_dump(recent(4, 2).to_dict() | {"name": "recent"}))
    for policy in (file, str(file)):
        assert LifespanCache(MODEL, None, policy).policy.rules == recent(4, 2).rules
    assert LifespanCache(MODEL, policy="full").policy == read_policy("full", 2)
    assert LifespanCache(MODEL, None, recent(4)).policy == recent(4)


def test_chunk_first_query_and_bits_may_be_given_by_position() -> None:
    cache = LifespanCache(MODEL, None, recent(4), 8, 3, (6, 4))
    assert (cache.chunk, cache.first_query, cache.bits) == (8, 3, (6, 4))


def test_neither_is_refused_with_an_example() -> None:
    with pytest.raises(SmartKVError, match=r"got neither: .*LifespanCache\(model, gates='smoll.*', footprint=0.25\)"):
        LifespanCache(MODEL)
    with pytest.raises(SmartKVError, match=r"got neither: .*LifespanCache\(model, gates, footprint=0.25\)"):
        LifespanCache(MODEL, random_gates(MODEL))


def test_a_footprint_without_gates_is_refused_with_an_example() -> None:
    with pytest.raises(SmartKVError, match=r"got none: .*LifespanCache\(model, gates='smoll.*', footprint=0.5\)"):
        LifespanCache(MODEL, footprint=0.5)


def test_a_footprint_beside_a_policy_that_decides_itself_is_refused() -> None:
    with pytest.raises(SmartKVError, match=r"policy 'custom' already decides .* footprint=0.5 .* one of the two"):
        LifespanCache(MODEL, policy=recent(4), footprint=0.5)


@pytest.mark.parametrize(
    ("policy", "expression"),
    [("all-gated", r"read_policy\('all-gated', 2\)"), (OPEN, "policy")],
    ids=["name", "object"],
)
@pytest.mark.parametrize(("footprint", "share"), [(None, "0.25"), (0.4, "0.4")])
def test_an_open_policy_is_refused_with_the_call_that_solves_it(
    policy: Any, expression: str, footprint: float | None, share: str
) -> None:
    if policy is OPEN and footprint is not None:
        assert LifespanCache(MODEL, gates_with_prices(), policy, footprint=footprint).budget is not None
        return
    call = rf"policy=solve\({expression}, {share}, Calibration\.measure\(model, gates, windows\)\)"
    with pytest.raises(SmartKVError, match=rf"leaves its (window|price) open: .* {call}"):
        LifespanCache(MODEL, gates_with_prices(), policy, footprint=footprint)


@pytest.mark.parametrize(
    ("gates", "policy", "footprint"), [(gates_with_prices(), OPEN, None), (None, "window", 0.5), (None, "window", None)]
)
def test_the_call_that_it_names_works(gates: GateBank | None, policy: Any, footprint: float | None) -> None:
    with pytest.raises(SmartKVError, match="leaves its") as refusal:
        LifespanCache(MODEL, gates, policy, footprint=footprint)
    call = re.search(r"policy=(solve\(.*\)) with token ids as windows", str(refusal.value))
    assert call is not None
    names = {"model": MODEL, "gates": gates, "policy": policy, "windows": [token_ids(96)]}
    solved = eval(call[1], {"solve": solve, "Calibration": Calibration, "read_policy": read_policy} | names)
    assert LifespanCache(MODEL, gates, solved).policy.open is None


def test_a_footprint_beside_an_open_policy_says_what_to_leave_out() -> None:
    with pytest.raises(SmartKVError, match=r"footprint=0.25 beside it .*; leave out policy, .* or leave out footprint"):
        LifespanCache(MODEL, gates_with_prices(), "all-gated", footprint=0.25)
    with pytest.raises(SmartKVError, match=r"footprint=0.25 beside it does not solve it; leave out footprint"):
        LifespanCache(MODEL, policy="window", footprint=0.25)
    with pytest.raises(SmartKVError, match=r"leave out footprint, or leave out policy for the policy that the gates"):
        LifespanCache(MODEL, gates_with_prices(), GATED, footprint=0.25)


def test_the_whole_cache_without_gates_is_the_policy_full() -> None:
    with pytest.raises(SmartKVError, match="policy='full'"):
        LifespanCache(MODEL, None, footprint=1)


# -- wrong types ------------------------------------------------------------------------------------------------------

GATES = "gates must be a GateBank, or the name, folder or hub id of gates, got "
POLICY = "policy must be a HybridPolicy, a YAML file or one of .*, got "
SHARE = "footprint must be the share .* above 0 and at most 1, got "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": 0.25}, POLICY + "0.25: for a share of the full cache write footprint=0.25"),
        ({"policy": {"rules": []}}, POLICY + r"a dict: read a mapping with HybridPolicy\.from_dict"),
        ({"policy": [LayerRule("all", "full")]}, POLICY + r"a list: write HybridPolicy\(\(LayerRule"),
        ({"policy": random_gates(MODEL)}, POLICY + "a GateBank: write gates="),
        ({"policy": True}, POLICY + "True: for example policy='full'"),
        ({"policy": "alll-gated"}, "policy 'alll-gated' is neither one of"),
        ({"gates": {"weight1": 1}, "footprint": 0.25}, GATES + r"a dict: load gates with GateBank\.from_pretrained"),
        ({"gates": 0.25}, GATES + "0.25: for a share of the full cache write footprint=0.25"),
        ({"gates": recent(4)}, GATES + "a HybridPolicy: write policy="),
        ({"gates": "window"}, GATES + "'window': this is the name of a policy, write policy='window'"),
        ({"gates": "", "footprint": 0.25}, GATES + "'': give a name, for example gates='smoll.*, or gates=None"),
        ({"gates": True}, GATES + "True: for example gates='smoll"),
        ({"gates": Path("nowhere"), "footprint": 0.5}, "gates 'nowhere' are neither a local folder"),
        *[({"footprint": wrong}, SHARE) for wrong in (0, 1.5, 25, -0.1, float("nan"), True, "0.25", [0.25])],
        ({"policy": recent(4), "first_query": -1}, "first_query must be a position in the text, 0 or more, got -1"),
        ({"policy": recent(4), "first_query": 1.5}, "first_query must be a position in the text, 0 or more, got 1.5"),
        ({"policy": recent(4), "chunk": 0.25}, "chunk must be a number of tokens, at least 1, got 0.25"),
        ({"policy": recent(4), "bits": "4"}, r"bits must be a whole number, or .* as in \(6, 4\), got '4'"),
        ({"policy": recent(4), "bits": (6, 4, 2)}, r"bits must be a whole number, or .* got \(6, 4, 2\)"),
    ],
    ids=lambda value: str(value).replace("\\", ""),
)
def test_a_wrong_argument_is_refused_in_one_line_that_leaves_the_model_alone(
    arguments: dict[str, Any], message: str
) -> None:
    before = state(MODEL)
    with pytest.raises(SmartKVError, match=message) as refusal:
        LifespanCache(MODEL, **arguments)
    assert "\n" not in str(refusal.value)
    assert state(MODEL) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a/model", r"got 'a/model': load it with AutoModelForCausalLM\.from_pretrained\('a/model'\)"),
        (Path("folder"), r"got 'folder': load it with AutoModelForCausalLM\.from_pretrained\('folder'\)"),
        (tiny_tokenizer(), r"got a \w+: give the model that this tokenizer belongs to"),
        (backbone(), r"got a Backbone: give its attribute \.model"),
        (random_gates(MODEL), "got a GateBank: load one with AutoModelForCausalLM"),
        (torch.nn.Linear(2, 2), "got a Linear"),
        (MODEL.config, "got a LlamaConfig"),
        (None, "got None"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_is_none_is_refused_by_every_cache(model: Any, message: str, tmp_path: Path) -> None:
    for make in (
        lambda: LifespanCache(model, None, recent(4)),
        lambda: QuantizedCache(model, "int8"),
        lambda: AdaptiveCache(model),
        lambda: load_cache(tmp_path / "cache.safetensors", model),
    ):
        with pytest.raises(SmartKVError, match="model must be a loaded transformers model, " + message):
            make()


@pytest.mark.parametrize("make", [QuantizedCache, lambda model, codec: AdaptiveCache(model, None, codec)])
def test_a_codec_of_a_wrong_type_is_refused(make: Any) -> None:
    with pytest.raises(SmartKVError, match=r"codec .*must be .*, got 8"):
        make(MODEL, 8)


def test_a_policy_of_another_depth_is_refused() -> None:
    with pytest.raises(SmartKVError, match="no rule for layers 1"):
        resolve_arguments(MODEL, None, HybridPolicy((LayerRule("0", "full"),)), None)
