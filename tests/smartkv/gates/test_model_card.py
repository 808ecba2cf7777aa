"""The model card of exported gates."""

import re
from pathlib import Path
from typing import Any

import pytest

from smartkv.gates.bank import GateBank
from smartkv.gates.model_card import model_card, usable_footprint
from smartkv.gates.pretrained import PRETRAINED, pretrained_gates
from smartkv.models.architecture import Fingerprint

PRICED = {"policy": {"name": "distilled"}, "prices": [[0.5, -3.73444], [0.125, -0.5]], "name": "my-gates"}


def snippet(card: str) -> str:
    """The Python of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_the_card_of_saved_gates_tells_their_shape_and_details(tmp_path: Path) -> None:
    bank = GateBank(Fingerprint("llama", 4, 2, 8, "0"), [1, 2, 3], hidden=6, details={"target": "log4 lifespan"})
    bank.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for part in ("6 gates", "4 layers × 2 KV heads × 8 dims", "layers 1-3", "log4 lifespan"):
        assert part in card


def test_the_card_of_gates_with_prices_shows_a_cache_and_every_price() -> None:
    card = model_card(6, "llama", "1-3", PRICED)
    assert 'LifespanCache(model, gates="my-gates", footprint=0.25)' in snippet(card)
    assert "| 0.5 | -3.734 |" in card and "| 0.125 | -0.500 |" in card
    assert '"prices"' not in card  # they stand in the table alone


@pytest.mark.parametrize("details", [{}, {"policy": PRICED["policy"]}, {"prices": PRICED["prices"]}])
def test_the_card_of_gates_without_a_policy_or_prices_shows_their_predictions(details: dict[str, Any]) -> None:
    card = model_card(6, "llama", "1-3", details)
    assert 'GateBank.from_pretrained("this folder or hub id", model=model)' in snippet(card)
    assert "gates.predict(layer, keys)" in snippet(card) and "| footprint | price |" not in card


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("log4 lifespan", "predicts how long later queries will attend to it."),
        ("log worth", "predicts for each age the log of what keeping it from then on is worth"),
        ("log future attention", "predicts how much attention later queries will pay to it."),
    ],
)
def test_the_card_says_what_the_gates_predict(target: str, said: str) -> None:
    assert said in " ".join(model_card(6, "llama", "1-3", {"target": target}).split())


@pytest.mark.parametrize("window", [None, 1024])
def test_the_length_of_the_windows_is_told_where_it_is_known(window: int | None) -> None:
    card = model_card(6, "llama", "1-3", PRICED | ({"training": {"window": window}} if window else {}))
    assert ("training windows of 1024 tokens." in card) == (window is not None)


def test_the_card_loads_the_model_where_its_name_is_known() -> None:
    code = snippet(model_card(6, "llama", "1-3", PRICED | {"training": {"backbone": "my-model"}}))
    assert 'load_backbone("my-model")' in code


@pytest.mark.parametrize(
    ("footprints", "shown"), [([0.125, 0.5], 0.25), ([0.7, 0.5], 0.5), ([0.1, 0.2], 0.2), ([0.354], 0.354)]
)
def test_an_example_s_footprint_has_a_price(footprints: list[float], shown: float) -> None:
    assert usable_footprint([[footprint, 0.0] for footprint in footprints]) == shown


REPORT = {
    "texts": [
        {"text": "code", "target": 0.25, "footprint": 0.2613, "delta_nll": 0.0123, "interval": [0.01, 0.02],
         "windows": 6, "window_delta_nll": 0.2},
        {"text": "books", "target": 0.125, "footprint": 0.13, "delta_nll": 0.03, "interval": [0.02, 0.04],
         "windows": 6, "window_delta_nll": None},
    ],
    "recall": [{"target": 0.25, "footprint": 0.22, "right": 0.95, "asked": 20, "window_right": 0.1}],
    "window": 2048,
    "command": "make gates MODEL=m OUT=o",
    "licence": "as the model's own (mit)",
    "machine": {"processor": "P", "cores": 2},
}  # fmt: skip


def test_the_card_shows_what_was_measured_and_the_command_that_made_the_gates() -> None:
    card = model_card(6, "llama", "1-3", PRICED | {"report": REPORT, "licence": "mit", "layer_shares": [[0.5, [1.0]]]})
    assert "| code | 0.25 | 0.261 | +0.0123 (+0.0100 to +0.0200) | +0.2000 | 6 |" in card
    assert "| books | 0.125 | 0.130 | +0.0300 (+0.0200 to +0.0400) |  | 6 |" in card  # no window was measured there
    assert "| 0.25 | 0.220 | 95% | 10% | 20 |" in card and "texts of 2048 tokens" in card
    assert "```bash\nmake gates MODEL=m OUT=o\n```" in card and "Licence: as the model's own (mit)" in card
    assert "license: mit\n---" in card and "processor P, cores 2" in card
    assert '"report"' not in card and "layer_shares" not in card


@pytest.mark.parametrize(("split", "said"), [("test", "test texts"), ("validation", "test and validation texts")])
def test_the_card_names_the_split_of_the_texts_that_were_measured(split: str, said: str) -> None:
    books, code = REPORT["texts"]
    card = model_card(6, "llama", "1-3", PRICED | {"report": REPORT | {"texts": [books | {"split": split}, code]}})
    assert f"on {said} of 2048 tokens" in card
    assert ("| code (validation) | 0.25 |" in card) == (split == "validation") and "| books | 0.125 |" in card


def test_the_card_of_validation_texts_alone_speaks_of_no_test() -> None:
    rows = [row | {"split": "validation"} for row in REPORT["texts"]]
    assert "on validation texts of" in model_card(6, "llama", "1-3", PRICED | {"report": REPORT | {"texts": rows}})


def test_the_card_of_gates_of_which_nothing_was_measured_claims_nothing() -> None:
    for report in ({}, {"texts": [], "recall": []}):
        card = model_card(6, "llama", "1-3", PRICED | {"report": report})
        assert "ΔNLL" not in card and "recalled" not in card and "license:" not in card


@pytest.mark.parametrize(("recalled", "told"), [(0, True), (3, False)])
def test_the_card_tells_that_the_model_recalls_none_of_the_facts(recalled: int, told: bool) -> None:
    report = {"recall": [], "facts": {"asked": 16, "recalled": recalled}}
    card = model_card(6, "llama", "1-3", PRICED | {"report": report})
    assert ("the full cache recalls 0 of 16 facts" in card) == told


@pytest.mark.parametrize("details", [{}, PRICED])
def test_the_snippet_is_python(details: dict[str, Any]) -> None:
    compile(snippet(model_card(6, "llama", "1-3", details)), "card", "exec")


@pytest.mark.parametrize("name", pretrained_gates())
def test_the_cards_that_come_with_smartkv_are_those_that_saving_writes(name: str, tmp_path: Path) -> None:
    GateBank.from_pretrained(name).save_pretrained(tmp_path)
    assert (PRETRAINED / name / "README.md").read_text() == (tmp_path / "README.md").read_text()
