"""Calibration and solving against plain loops."""

import math
from typing import Any

import pytest
import torch

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.budgets import Calibration, how_to_solve, policy_of, price_curve, solve, solved_details
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import llama, token_ids

TOKENS, FIRST = 24, 5
GATED = LayerRule("all", "gated", 3)


def random_calibration(seed: int = 0) -> Calibration:
    """Two layers, two windows, two heads."""
    generator = torch.Generator().manual_seed(seed)
    predictions = {layer: torch.randn(2, 2, TOKENS, generator=generator) for layer in range(2)}
    return Calibration(predictions, 2, TOKENS, FIRST, TOKENS - 1)


def counted(policy: HybridPolicy, calibration: Calibration) -> float:
    """The footprint, key by key and query by query."""
    visible = held = 0
    for layer, rule in enumerate(policy.by_layer(2)):
        for prediction in calibration.predictions[layer].flatten(0, 1).tolist():
            for query in range(calibration.first_query, calibration.last):
                for key in range(query + 1):
                    ttl = math.inf if rule.rule == "full" else 0.0
                    price = policy.price if rule.price is None else rule.price
                    if rule.rule == "gated" and price is not None and prediction[key] > price:
                        ttl = (
                            math.ceil((policy.multiple or math.inf) * 4.0 ** prediction[key])
                            if (math.isfinite(policy.multiple or math.inf))
                            else math.inf
                        )
                    visible += key < policy.sinks or query - key < max(ttl, rule.window or 0)
                    held += 1
    return visible / held


@pytest.mark.parametrize(
    "policy",
    [
        HybridPolicy((GATED,), sinks=2, price=0.3),
        HybridPolicy((GATED,), sinks=0, price=0.3, multiple=2.5),
        HybridPolicy((LayerRule("0", "window", 6), LayerRule("1", "full")), sinks=2),
        HybridPolicy((LayerRule("0", "gated", 1, price=-0.5), LayerRule("1", "gated", 4)), sinks=1, price=0.5),
    ],
)
def test_the_footprint_is_a_plain_count(policy: HybridPolicy) -> None:
    calibration = random_calibration()
    assert calibration.footprint(policy) == pytest.approx(counted(policy, calibration), abs=1e-12)


def test_the_footprint_of_gates_that_judge_for_ages_is_a_plain_count() -> None:
    predictions = torch.randn(1, 2, TOKENS, 2, generator=torch.Generator().manual_seed(0)).cummin(dim=-1).values
    calibration = Calibration({0: predictions}, 1, TOKENS, FIRST, TOKENS - 1, ages=(3, 7))
    visible = 0
    for number, (first, second) in enumerate(predictions.flatten(0, 2).tolist()):
        key = number % TOKENS
        for query in range(max(FIRST, key), TOKENS - 1):
            ttl = math.inf if second > 0.1 else 7 if first > 0.1 else 3
            visible += key < 1 or query - key < ttl
    full = 2 * sum(query + 1 for query in range(FIRST, TOKENS - 1))
    policy = HybridPolicy((GATED,), sinks=1, price=0.1)
    assert calibration.footprint(policy) == pytest.approx(visible / full, abs=1e-12)


@pytest.mark.parametrize("first", [0, FIRST])
def test_without_gates_the_footprint_is_a_plain_count_too(first: int) -> None:
    policy = HybridPolicy((LayerRule("0", "window", 6), LayerRule("1", "full")), sinks=2)
    counted_from = Calibration(random_calibration().predictions, 2, TOKENS, first, TOKENS - 1)
    calibration = Calibration.without_gates(2, TOKENS, *([first] if first else []))  # all queries by default
    assert calibration.footprint(policy) == pytest.approx(counted(policy, counted_from), abs=1e-12)
    with pytest.raises(SmartKVError, match="gates layer 0, but there are no gates for it"):
        calibration.footprint(HybridPolicy((GATED,), price=0.0))


@pytest.mark.parametrize("target", [0.4, 0.6])
@pytest.mark.parametrize("figures", [{"price": None}, {"price": -math.inf, "multiple": None}])
def test_solving_comes_up_to_the_target_within_one_key(figures: dict[str, float | None], target: float) -> None:
    calibration = random_calibration()
    found = calibration.footprint(solve(HybridPolicy((GATED,), sinks=1, **figures), target, calibration))
    queries = range(FIRST, TOKENS - 1)
    one_key = len(queries) / (8 * sum(query + 1 for query in queries))  # all queries see it, in one of eight heads
    assert target - one_key <= found <= target


def test_a_solved_window_is_the_largest_that_fits() -> None:
    calibration, policy = random_calibration(), HybridPolicy((LayerRule("all", "window"),), sinks=1)
    window = solve(policy, 0.5, calibration).rules[0].window
    assert window is not None
    assert calibration.footprint(policy.closed(window)) <= 0.5 < calibration.footprint(policy.closed(window + 1))


@pytest.mark.parametrize("window", [1, 7])
def test_a_window_that_keeps_exactly_the_target_is_the_one(window: int) -> None:
    calibration, policy = random_calibration(), HybridPolicy((LayerRule("all", "window"),), sinks=1)
    assert solve(policy, calibration.footprint(policy.closed(window)), calibration).rules[0].window == window


@pytest.mark.parametrize(
    "figures", [{"price": None}, {"price": -math.inf, "multiple": None}, {"rules": (LayerRule("all", "window"),)}]
)
def test_the_whole_cache_can_be_the_target(figures: dict[str, Any]) -> None:
    calibration, policy = random_calibration(), HybridPolicy(**{"rules": (GATED,), "sinks": 1} | figures)
    assert calibration.footprint(solve(policy, 1.0, calibration)) == 1.0


def test_a_multiple_far_below_1_is_found() -> None:
    calibration = random_calibration()
    calibration.predictions.update({layer: values + 5 for layer, values in calibration.predictions.items()})
    policy = solve(HybridPolicy((GATED,), sinks=1, price=-math.inf, multiple=None), 0.4, calibration)
    assert policy.multiple is not None and policy.multiple < 0.1
    assert calibration.footprint(policy) == pytest.approx(0.4, abs=0.01)


def test_a_range_with_a_price_of_its_own_keeps_it() -> None:
    policy = HybridPolicy((LayerRule("0", "gated", 3, price=0.9), LayerRule("1", "gated", 3)))
    solved = solve(policy, 0.65, random_calibration())
    assert [rule.price for rule in solved.rules] == [0.9, None]
    assert solved.price is not None


@pytest.mark.parametrize("figures", [{"price": None}, {"price": -math.inf, "multiple": None}])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_open_windows_take_their_share_and_gates_the_rest(share: float, figures: dict[str, float | None]) -> None:
    calibration, target = random_calibration(), 0.7
    open_both = HybridPolicy((LayerRule("all", "gated"),), sinks=1, window_share=share, **figures)
    policy = solve(open_both, target, calibration)

    def windows_only(window: int) -> float:
        return calibration.footprint(HybridPolicy((LayerRule("all", "window", window),), sinks=1))

    window = policy.rules[0].window
    assert window is not None
    assert windows_only(window) <= share * target < windows_only(window + 1)
    assert calibration.footprint(policy) == pytest.approx(target, abs=0.02)


def test_open_windows_take_their_share_beside_gates_with_a_price_of_their_own() -> None:
    calibration, policy = random_calibration(), HybridPolicy((LayerRule("all", "window"),), sinks=1)
    least = calibration.footprint(policy.closed(1))
    priced = HybridPolicy((LayerRule("all", "gated", price=-9.0),), sinks=1, window_share=0.5)
    assert solve(priced, 2 * least, calibration).rules[0].window == 1


@pytest.mark.parametrize(
    ("target", "message"), [(0, "above 0 and at most 1"), (1.5, "above 0 and at most 1"), (0.01, "cannot keep 0.01")]
)
def test_a_footprint_out_of_reach_is_refused(target: float, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        solve(HybridPolicy((GATED,)), target, random_calibration())


def test_nothing_open_and_nothing_to_calibrate_on_are_refused() -> None:
    with pytest.raises(SmartKVError, match="nothing open"):
        solve(HybridPolicy((GATED,), price=0.0), 0.5, random_calibration())
    with pytest.raises(SmartKVError, match="calibration needs windows"):
        Calibration.measure(llama(), None, [])


@torch.no_grad()
@pytest.mark.parametrize("rule", [LayerRule("all", "window", 6), GATED])
def test_a_measured_calibration_gives_what_a_cache_holds(rule: LayerRule) -> None:
    """Exactly so at layer 0, whose keys do not depend on eviction; in all layers where no gate decides."""
    model, ids = llama(), token_ids(TOKENS)
    torch.manual_seed(0)
    gates = GateBank(Fingerprint.of(model), hidden=4)
    calibration = Calibration.measure(model, gates, [ids], first_query=FIRST)
    price = float(calibration.predictions[0].median()) + 1e-5
    policy = HybridPolicy((rule,), sinks=1, price=price)
    cache = LifespanCache(model, gates, policy, chunk=7, first_query=FIRST)
    with cache:
        model(ids[None, :-1], past_key_values=cache)
    layer0 = Calibration(calibration.predictions, 1, TOKENS, FIRST, TOKENS - 1)
    assert layer0.footprint(policy) == pytest.approx(float(cache.footprint_by_head[0].mean()), abs=1e-12)
    assert 0 < layer0.footprint(policy) < 1
    if rule.rule == "window":
        assert calibration.footprint(policy) == pytest.approx(cache.footprint, abs=1e-12)


def test_gates_remember_prices_and_give_their_policy_at_a_footprint() -> None:
    calibration = random_calibration()
    open_policy = HybridPolicy((GATED,), sinks=1)
    curve = price_curve(open_policy, calibration)
    assert len(curve) >= 3 and [f for f, _ in curve] == sorted((f for f, _ in curve), reverse=True)
    gates = GateBank(Fingerprint("llama", 2, 2, 4, ""), details={"policy": open_policy.to_dict(), "prices": curve})
    for footprint, price in curve:
        assert policy_of(gates, footprint) == solve(open_policy, footprint, calibration)
        assert policy_of(gates, footprint).price == pytest.approx(price)
    between = (curve[0][0] * curve[1][0]) ** 0.5
    assert policy_of(gates, between).price == pytest.approx((curve[0][1] + curve[1][1]) / 2)
    with pytest.raises(SmartKVError, match=r"have prices for footprints from 0\.\d+ to 0\.707, not for 0\.9"):
        policy_of(gates, 0.9)
    with pytest.raises(SmartKVError, match="remember no policy with prices"):
        policy_of(GateBank(gates.fingerprint), 0.5)


def test_prices_are_remembered_for_what_can_be_kept_also_where_the_largest_share_cannot() -> None:
    rules = (LayerRule("0", "window", 1), LayerRule("1", "gated", 1))
    footprints = [footprint for footprint, _ in price_curve(HybridPolicy(rules, sinks=1), random_calibration())]
    assert footprints and max(footprints) < 0.7


def test_gates_remember_what_each_layer_keeps_at_each_of_their_prices() -> None:
    calibration, policy = random_calibration(), HybridPolicy((GATED,), sinks=1)
    calibration.predictions[1] += 0.5  # layer 1 keeps more
    solved = solved_details(policy, calibration)
    assert solved["prices"] == price_curve(policy, calibration) and len(solved["prices"]) > 2
    for (footprint, price), (same, shares) in zip(solved["prices"], solved["layer_shares"], strict=True):
        alone = [  # the footprint of one layer: the other one counts nothing, as it is not there
            Calibration({0: calibration.predictions[layer]}, 1, TOKENS, FIRST, TOKENS - 1) for layer in range(2)
        ]
        assert same == footprint
        assert shares == [pytest.approx(each.footprint(policy.closed(price)), abs=1e-4) for each in alone]
    assert all(first < second for _, (first, second) in solved["layer_shares"])


def test_a_layer_that_slides_keeps_all_that_its_own_cache_would_hold() -> None:
    predictions = {1: random_calibration().predictions[1]}
    calibration = Calibration(predictions, 2, TOKENS, FIRST, TOKENS - 1, sliding_windows=(6, None))
    shares = calibration.layer_shares(HybridPolicy((GATED,), sinks=1, price=0.3))
    assert shares[0] == 1.0 and shares[1] < 1.0


def test_the_advice_is_the_call_that_solves() -> None:
    assert how_to_solve().startswith("policy=solve('all-gated', 0.25, Calibration.measure(model, gates, windows)) ")
    own = how_to_solve(0.5, policy="mine", gates="bank")
    assert own.startswith("policy=solve(mine, 0.5, Calibration.measure(model, bank, windows)) ")


def test_gates_with_one_price_give_it_and_gates_with_half_of_what_it_takes_are_refused() -> None:
    fingerprint, policy = Fingerprint("llama", 2, 2, 4, ""), HybridPolicy((GATED,), sinks=1)
    gates = GateBank(fingerprint, details={"policy": policy.to_dict(), "prices": [[0.5, 1.25]]})
    assert policy_of(gates, 0.5) == policy.closed(1.25)
    for details in ({"policy": policy.to_dict()}, {"prices": [[0.5, 1.25]]}):
        with pytest.raises(SmartKVError, match="remember no policy with prices"):
            policy_of(GateBank(fingerprint, details=details), 0.5)


@pytest.mark.parametrize("gates", ["smollm2-135m-instruct", None])
def test_a_policy_of_something_else_than_gates_is_refused_with_what_to_do(gates: Any) -> None:
    with pytest.raises(SmartKVError, match=r"expected gates, got .*footprint=0\.25"):
        policy_of(gates, 0.25)
