"""Budgets as users give them, and their division among layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.planned_budget import Budget, divide, layer_weights, parse_bytes


@pytest.mark.parametrize(
    ("size", "count"),
    [(200, 200), ("200B", 200), ("200MB", 2 * 10**8), ("1.5 GiB", 3 * 2**29), ("3kb", 3000), (" 2 MiB ", 2**21)],
)
def test_bytes_are_read_in_every_usual_form(size: int | str, count: int) -> None:
    assert parse_bytes(size) == count


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "200", "MB", "2 parsec", "-3MB", "", None])
def test_what_is_no_number_of_bytes_is_refused_with_what_came(size: object) -> None:
    with pytest.raises(SmartKVError, match="max_bytes must be a number of bytes above 0"):
        parse_bytes(size)  # type: ignore[arg-type]


def test_a_budget_is_written_as_it_is_given() -> None:
    assert [str(Budget(512)), str(Budget(max_bytes=2_000_000)), str(Budget(footprint=0.25, plan=900))] == [
        "max_tokens=512",
        "max_bytes=2,000,000",
        "footprint=0.25",
    ]
    assert Budget(max_bytes=5).argument == "max_bytes"


LAYER = st.tuples(st.floats(1e-6, 10), st.integers(0, 50), st.integers(0, 400))  # weight, least, and room above it


@given(st.lists(LAYER, min_size=1, max_size=30), st.data())
def test_a_division_adds_up_within_its_bounds(layers: list[tuple[float, int, int]], data: st.DataObject) -> None:
    weights, least, more = ([layer[n] for layer in layers] for n in range(3))
    most = [low + 1 + extra for low, extra in zip(least, more, strict=True)]
    total = data.draw(st.integers(sum(least), 2 * sum(most)))
    shares = divide(total, weights, least, most)
    assert sum(shares) == min(total, sum(most))
    assert all(low <= share <= high for low, share, high in zip(least, shares, most, strict=True))


def test_where_no_bound_is_met_shares_are_in_proportion() -> None:
    assert divide(100, [1, 3, 6], [0] * 3, [1000] * 3) == [10, 30, 60]
    assert divide(100, [1, 3, 6], [20, 0, 0], [1000] * 3) == [20, 27, 53]


def test_the_nearest_remembered_shares_are_taken_and_none_of_another_model() -> None:
    torch.manual_seed(0)
    gates = GateBank(Fingerprint("llama", 2, 1, 8, ""))
    assert layer_weights(gates, 0.3, 2) == layer_weights(None, 0.3, 2) == [1, 1]
    gates.details["layer_shares"] = [[0.5, [0.6, 0.4]], [0.125, [0.2, 0.0]], [0.25, [0.9, 0.1, 0.3]]]
    assert layer_weights(gates, 0.3, 2) == [0.6, 0.4]
    assert layer_weights(gates, 0.2, 2) == [0.2, 1e-6]
    assert layer_weights(gates, 0.2, 3) == [0.9, 0.1, 0.3]
