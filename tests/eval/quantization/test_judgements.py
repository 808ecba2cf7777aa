"""What is expected of quantised caches: ratios, orders, and short texts."""

from typing import Any

import pytest

from eval.quantization.judgements import judge

GOOD: dict[str, dict[str, Any]] = {
    "FP16": {"ratio_payload": 1.0, "ratio_stored": 1.0, "exact_tokens": 0},
    "INT8": {"ratio_payload": 0.5, "ratio_stored": 0.5625, "exact_tokens": 0},
    "INT4": {"ratio_payload": 0.25, "ratio_stored": 0.3125, "exact_tokens": 0},
    "KIVI": {"ratio_payload": 0.1875, "ratio_stored": 0.33, "exact_tokens": 128},
    "SmartKV": {"ratio_payload": 0.45, "ratio_stored": 0.53, "ratio_encoded": 0.5, "exact_tokens": 64},
}
ERRORS = {"FP16": 0.001, "INT8": 0.01, "INT4": 0.1, "KIVI": 0.3, "SmartKV": 0.02}
for name, row in GOOD.items():
    row |= {f"error_{what}": ERRORS[name] for what in ("key", "value", "output")}


def judged(budget: float = 0.5, tokens: int = 1024, **changes: dict[str, Any]) -> dict[bool | None, list[str]]:
    """The texts of the judgements by how they came out, after changes of some rows."""
    figures = {name: row | changes.get(name, {}) for name, row in GOOD.items()}
    found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for judgement in judge(figures, budget, tokens):
        found[judgement.fine].append(judgement.text)
    return found


def test_figures_as_they_should_be_are_fine() -> None:
    found = judged()
    assert not found[False] and len(found[True]) == 10
    assert found[None] and "KIVI's keys have 2 bits" in found[None][0]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("INT8", {"ratio_payload": 0.51}, ["ratio_payload of INT8 is 0.5"]),
        ("KIVI", {"ratio_payload": 0.25}, ["ratio_payload of KIVI is 0.1875"]),
        ("INT4", {"error_key": 0.005}, ["error_key FP16 < INT8 < INT4"]),
        ("INT8", {"error_value": 0.0}, ["error_value FP16 < INT8 < INT4"]),
        ("INT8", {"error_value": float("nan")}, ["error_value FP16 < INT8 < INT4"]),
        ("SmartKV", {"error_output": 0.2}, ["error_output INT8 < SmartKV < INT4"]),
        ("SmartKV", {"error_output": 0.005}, ["error_output INT8 < SmartKV < INT4"]),
        ("SmartKV", {"ratio_stored": 0.35}, ["ratio_stored of SmartKV is 0.40 to 0.60"]),
        ("SmartKV", {"ratio_stored": 0.75, "ratio_encoded": 0.73}, ["ratio_stored of SmartKV is 0.40 to 0.60"]),
        ("INT8", {"ratio_stored": 0.3125}, ["ratio_stored INT4 < INT8 < FP16"]),
    ],
)
def test_one_figure_that_is_off_is_named(name: str, changes: dict[str, Any], said: list[str]) -> None:
    found = judged(**{name: changes})[False]
    assert len(found) == len(said) and all(text.startswith(start) for text, start in zip(found, said, strict=True))


def test_a_short_text_exceeds_the_range_and_is_not_blamed_for_it() -> None:
    found = judged(tokens=256, SmartKV={"ratio_stored": 0.76, "ratio_encoded": 0.52, "exact_tokens": 128})
    assert not found[False]
    assert any("for the tokens that are encoded (0.5200)" in text for text in found[True])
    assert any("latest 128 of 256 tokens are exact, so SmartKV stores 0.7600 in all" in text for text in found[None])


def test_a_text_that_is_exact_as_a_whole_is_not_judged() -> None:
    found = judged(tokens=64, SmartKV={"ratio_stored": 1.0156, "ratio_encoded": None, "exact_tokens": 64})
    assert not found[False] and any("64 tokens is exact as a whole" in text for text in found[None])


@pytest.mark.parametrize(("budget", "stored", "payload"), [(0.3, 0.33, 0.24), (0.6, 0.61, 0.55)])
def test_another_budget_has_a_range_of_its_own(budget: float, stored: float, payload: float) -> None:
    row = {"ratio_stored": stored, "ratio_payload": payload, "error_output": 0.5}
    found = judged(budget, SmartKV=row)
    assert any(f"is {0.8 * budget:.2f} to {1.2 * budget:.2f}" in text for text in found[True])
    assert not found[False], "with fewer bits than INT4, or more than INT8, its error has no place between theirs"
