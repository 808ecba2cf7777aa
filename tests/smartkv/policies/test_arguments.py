"""What calibration and solving take: gates and policies in every form; anything else is refused in one line."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from tests.models import llama, token_ids

MODEL, IDS = llama(), token_ids(96)
GATES = GateBank(Fingerprint.of(MODEL), hidden=4)
CALIBRATION = Calibration.measure(MODEL, GATES, [IDS])
ENCODE = r"encode a text with tokenizer\(text, return_tensors='pt'\)\.input_ids\[0\]"


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [GATES, None], ids=["gates", "none"])
@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([IDS, IDS[:10]], "of one length, got 96 and 10 tokens: cut them"),
        ([1, 2, 3], "got 1 among them: " + ENCODE),
        ([IDS.tolist()], "got a list among them: " + ENCODE),
        (["a text"], "got 'a text' among them: " + ENCODE),
        ("a text", "got 'a text': " + ENCODE),
        ({"input_ids": IDS}, "got a dict: " + ENCODE),
        (None, "got None: " + ENCODE),
        (3, "got 3: " + ENCODE),
        (IDS, r"got one tensor \[96\]: write windows=\[ids\]"),
        ([IDS[None]], r"got one of shape \[1, 96\]: give its rows, such as ids\[0\]"),
        ([IDS.float()], "got float32: " + ENCODE),
        ([IDS > 3], "got bool: " + ENCODE),
        ([IDS + 64], "token ids of this model go from 0 to 63, got .* use the model's own tokenizer"),
        ([IDS - 64], "token ids of this model go from 0 to 63, got -64 to .* use the model's own tokenizer"),
        ([token_ids(257)], "windows of 257 tokens are longer than the model's 256 positions"),
        ([IDS[:1]], "calibration needs windows of more than 1 tokens, got windows of 1"),
        ([], "calibration needs windows of more than 1 tokens, got none"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_windows_that_are_no_token_ids_are_refused(windows: Any, message: str, gates: GateBank | None) -> None:
    with pytest.raises(SmartKVError, match=message) as refusal:
        Calibration.measure(MODEL, gates, windows)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "a/model"}, "model must be a loaded transformers model, got 'a/model'"),
        ({"gates": True}, "gates must be a GateBank, or the name, folder or hub id of gates, got True"),
        ({"gates": "window"}, "this is the name of a policy"),
        ({"gates": GateBank(Fingerprint.of(llama(num_hidden_layers=3)), hidden=4)}, "for llama, 3 layers"),
        ({"first_query": "3"}, "first_query must be a position in the text, 0 or more, got '3'"),
        ({"first_query": 3.5}, "first_query must be a position in the text, 0 or more, got 3.5"),
        ({"first_query": 95}, "calibration needs windows of more than 96 tokens, got windows of 96"),
    ],
    ids=str,
)
def test_other_arguments_of_a_calibration_are_refused_too(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        Calibration.measure(**{"model": MODEL, "gates": GATES, "windows": [IDS]} | arguments)


def test_a_calibration_of_keys_or_of_no_gates_needs_a_query_that_counts() -> None:
    keys = [[torch.zeros(1, 2, 9, 8)] * 2]
    for wrong in (
        lambda: Calibration.of(GATES, []),
        lambda: Calibration.of(GATES, keys, 8),
        lambda: Calibration.without_gates(2, 9, 8),
        lambda: Calibration.without_gates(2, 0),
    ):
        with pytest.raises(SmartKVError, match="calibration needs windows of more than"):
            wrong()
    with pytest.raises(SmartKVError, match="gates must be a GateBank here, got 'gates'"):
        Calibration.of("gates", keys)  # type: ignore[arg-type]


def test_a_calibration_takes_gates_of_a_folder_and_windows_in_one_tensor(tmp_path: Path) -> None:
    GATES.save_pretrained(tmp_path)
    windows = torch.stack([IDS, IDS.flip(0)])
    by_name = Calibration.measure(MODEL, tmp_path, windows)
    measured = Calibration.measure(MODEL, GATES, list(windows.int()))
    assert all(torch.equal(by_name.predictions[layer], measured.predictions[layer]) for layer in range(2))


# -- a policy's footprint and solving ---------------------------------------------------------------------------------


def test_a_policy_may_be_given_by_its_name() -> None:
    assert CALIBRATION.footprint("full") == 1.0
    assert solve("all-gated", 0.5, CALIBRATION) == solve(read_policy("all-gated", 2), 0.5, CALIBRATION)


def test_open_windows_and_an_open_multiple_are_both_solved() -> None:
    policy = HybridPolicy((LayerRule("all", "gated"),), price=-math.inf, multiple=None)
    solved = solve(policy, 0.5, CALIBRATION)
    assert solved.open is None and 0.45 < CALIBRATION.footprint(solved) <= 0.5


def test_a_policy_with_something_open_has_no_footprint() -> None:
    for policy in ("window", "lifespan", HybridPolicy((LayerRule("all", "gated", 3),))):
        with pytest.raises(
            SmartKVError, match=r"open, so it has no footprint yet: .*solve\(policy, 0\.25, calibration"
        ):
            CALIBRATION.footprint(policy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "all-gate"}, "policy 'all-gate' is neither one of"),
        ({"policy": 0.25}, "policy must be a HybridPolicy, a YAML file or one of .* got 0.25"),
        ({"policy": None}, "policy must be a HybridPolicy, a YAML file or one of .* got None"),
        ({"footprint": "a"}, "footprint must be the share .* got 'a': for a quarter write footprint=0.25"),
        ({"footprint": None}, "footprint must be the share .* got None"),
        ({"footprint": True}, "footprint must be the share .* got True"),
        ({"calibration": GATES}, r"calibration must be a Calibration, got a GateBank: write Calibration\.measure\("),
        ({"calibration": [IDS]}, r"calibration must be a Calibration, got a list: write Calibration\.measure\("),
        (
            {"calibration": Calibration.without_gates(2, 96)},
            "policy 'all-gated' asks gates, but the calibration was measured without any",
        ),
    ],
    ids=str,
)
def test_solving_refuses_other_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        solve(**{"policy": "all-gated", "footprint": 0.5, "calibration": CALIBRATION} | arguments)


@pytest.mark.parametrize("layers", ["2", True, 0, None, MODEL], ids=lambda value: type(value).__name__)
def test_a_number_of_layers_that_is_none_is_refused(layers: Any) -> None:
    with pytest.raises(SmartKVError, match="layers must be the model's number of layers, got"):
        read_policy("default", layers)


# -- footprints out of reach ------------------------------------------------------------------------------------------


def test_a_footprint_that_solving_cannot_reach_names_itself_and_the_way_on() -> None:
    with pytest.raises(FootprintOutOfReach, match=r"cannot keep 0\.01 of .* open it keeps .*; give a larger footprint"):
        solve("all-gated", 0.01, CALIBRATION)
    gated = HybridPolicy((LayerRule("0", "gated", 3), LayerRule("1", "window", 3)))
    with pytest.raises(FootprintOutOfReach, match="give a smaller footprint; policy 'full' keeps everything"):
        solve(gated, 1, CALIBRATION)


def test_the_least_that_open_windows_and_gates_can_keep_is_told_as_a_footprint() -> None:
    with pytest.raises(FootprintOutOfReach) as refusal:
        solve("all-gated", 0.01, CALIBRATION)
    least = float(str(refusal.value).split("it keeps ")[1].split(" to ")[0])
    assert CALIBRATION.footprint(solve("all-gated", least + 0.001, CALIBRATION)) <= least + 0.001


@pytest.mark.parametrize("prices", [[[0.5, -0.1], [0.25, 0.1]], []], ids=["prices", "none"])
@pytest.mark.parametrize(
    ("footprint", "way"),
    [(1, "policy='full' keeps all keys"), (0.01, r"solve\('all-gated', 0\.01, Calibration\.measure\(model, gates, ")],
)
def test_gates_without_a_price_for_a_footprint_name_the_way_on(
    prices: list[list[float]], footprint: float, way: str
) -> None:
    policy = HybridPolicy((LayerRule("all", "gated", 3),)).to_dict()
    gates = GateBank(Fingerprint.of(MODEL), hidden=4, details={"policy": policy, "prices": prices})
    with pytest.raises(SmartKVError, match=way) as refusal:
        policy_of(gates, footprint)
    assert isinstance(refusal.value, FootprintOutOfReach) == bool(prices)
