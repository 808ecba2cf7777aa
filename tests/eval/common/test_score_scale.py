"""What a gate's score means to a reader: unit, words, and the range of colours and codes."""

import math
from typing import Any

import pytest
import torch

from eval.chat.page import encode_predictions
from eval.common.score_scale import ATTENTION, LIFESPAN, PLAIN, WORTH, ScoreScale
from smartkv import GateBank
from smartkv.models.architecture import Fingerprint

FINGERPRINT = Fingerprint("llama", 1, 1, 4, "0" * 16)


def gates(outputs: int = 1, **details: Any) -> GateBank:
    return GateBank(FINGERPRINT, None, 4, outputs, details)


@pytest.mark.parametrize(
    ("bank", "price", "said"),
    [
        (None, 2.5, "price 2.50 (predicted to live 32 tokens)"),
        (gates(), 2.5, "price 2.50 (predicted to live 32 tokens)"),
        (
            gates(2, target="life beyond ages", objective={"ages": [4, 16]}),
            1,
            "price 1.00 (predicted to live 4 tokens)",
        ),
        (gates(target="log worth", ages=[16]), -2, "price -2.00 (worth 0.14 nats, asked at the ages of 16 tokens)"),
        (
            gates(3, ages=[16, 64, 1024]),
            -7.1,
            "price -7.10 (worth 0.00083 nats, asked at the ages of 16, 64 and 1,024 tokens)",
        ),
        (gates(target="log future attention"), -7, "price -7.00 (predicted to get 0.00091 of the attention)"),
        (gates(target="rank of lifespan"), 1.5, "price 1.50 (scored 1.5)"),
    ],
)
def test_a_price_is_told_in_the_unit_of_the_gates(bank: GateBank | None, price: float, said: str) -> None:
    assert ScoreScale.of(bank).describe_price(price) == said


def test_lifespans_have_the_same_colours_and_codes_on_every_page() -> None:
    fitted = LIFESPAN.fitted(torch.tensor([9.0, -3.0]), [7.0])
    assert fitted is LIFESPAN
    assert [label for _, label in fitted.to_dict()["ticks"]] == ["1", "4", "16", "64", "256", "1,024"]


@pytest.mark.parametrize("scale", [WORTH, ATTENTION, PLAIN])
def test_other_scores_have_codes_for_all_and_colours_for_most(scale: ScoreScale) -> None:
    scores = torch.linspace(-4, 1, 300)
    scores[0], scores[1], scores[2] = -25, 8, math.nan
    fitted = scale.fitted(scores, [-6.5])
    assert (fitted.bottom, fitted.top) == (-7, 1)
    known = scores[~scores.isnan()]
    codes = encode_predictions(known, fitted).astype(float)
    assert (torch.tensor(codes) / fitted.steps + fitted.low - known).abs().max() <= 33 / 254 / 2 + 1e-5
    assert encode_predictions(scores, fitted)[2] == 255


@pytest.mark.parametrize("scores", [torch.full((5,), -3.0), torch.tensor([math.nan])])
def test_scores_without_a_spread_have_a_scale_too(scores: torch.Tensor) -> None:
    fitted = WORTH.fitted(scores, [])
    assert fitted.top > fitted.bottom and all(label for _, label in fitted.to_dict()["ticks"])
