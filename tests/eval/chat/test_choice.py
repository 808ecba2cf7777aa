"""What `eval generate` keeps: a policy, a price or a budget, from the options of the command."""

from typing import Any

import pytest

from eval.chat.choice import A_QUARTER, CHAT_PLAN, choose
from eval.common.score_scale import ScoreScale
from smartkv import GateBank
from smartkv.errors import SmartKVError
from smartkv.policies.planned_budget import Budget

GATES = GateBank.from_pretrained("smollm2-135m-instruct")


def chosen(gates: GateBank | None = GATES, **options: Any) -> Any:
    figures = dict.fromkeys(("name", "price", "footprint", "max_tokens", "max_bytes", "plan"))
    return choose(**figures | {"chat": False, "gates": gates, "layers": 30} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, Budget(footprint=A_QUARTER)),
        ({"chat": True}, Budget(footprint=A_QUARTER, plan=CHAT_PLAN)),
        ({"chat": True, "plan": 500}, Budget(footprint=A_QUARTER, plan=500)),
        ({"chat": True, "max_tokens": 90}, Budget(max_tokens=90)),
        ({"footprint": 0.5}, Budget(footprint=0.5)),
        ({"max_bytes": "2MB"}, Budget(max_bytes=2_000_000)),
        ({"price": -1.0}, None),
        ({"name": "all-gated"}, None),
        ({"name": "window", "footprint": 0.5}, None),
    ],
)
def test_gates_hold_a_budget_unless_a_price_or_a_policy_decides(options: dict[str, Any], budget: Budget | None) -> None:
    assert chosen(**options).budget == budget


def test_gates_that_remember_what_layers_get_need_no_texts() -> None:
    assert not chosen().needs_texts and chosen(name="all-gated").needs_texts
    bare = GateBank(GATES.fingerprint, outputs=3, details={"ages": [16, 64, 256]})
    assert chosen(gates=bare).needs_texts


def test_the_line_says_policy_gates_window_and_budget() -> None:
    said = chosen(plan=800).describe(ScoreScale.of(GATES), "mine")
    assert said == "policy distilled, gates mine, window 16, budget footprint=0.25 of 800 tokens"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"footprint": 0.25, "max_tokens": 50}, "footprint and max_tokens both say"),
        ({"price": 1.0, "max_tokens": 50}, "price=1 decides what stays"),
        ({"name": "window", "plan": 50}, "policy 'window' leaves window open"),
        ({"name": "window", "price": 1.0}, "policy 'window' asks no gates"),
        ({"footprint": 2.0}, "footprint must be the share"),
    ],
)
def test_figures_that_contradict_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SmartKVError, match=said):
        chosen(**options)
