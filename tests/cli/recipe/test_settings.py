"""Sizes, and what decides a result."""

import json
from dataclasses import fields
from itertools import pairwise

import pytest

from cli.recipe.settings import SIZES, Options
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig


def test_a_larger_size_has_no_less_of_anything() -> None:
    order = [SIZES[name] for name in ("tiny", "small", "standard", "large")]
    for smaller, larger in pairwise(order):
        for field in fields(smaller):
            here, there = getattr(smaller, field.name), getattr(larger, field.name)
            assert here <= there if isinstance(here, int) else all(a <= b for a, b in zip(here, there, strict=True))


def test_windows_are_no_longer_than_the_models_positions() -> None:
    amounts = SIZES["standard"].within(1500)
    assert (amounts.window, amounts.short_window, amounts.follow_up) == (1500, 1024, 750)
    assert SIZES["standard"].within(10**9) == SIZES["standard"]


def test_short_windows_have_no_room_for_facts() -> None:
    assert SIZES["standard"].within(511).facts == 0 < SIZES["standard"].within(512).facts


def test_a_model_with_hardly_any_positions_is_refused() -> None:
    with pytest.raises(SmartKVError, match="the model has 64 positions: gates need windows of at least 128"):
        SIZES["tiny"].within(64)


def test_options_are_json() -> None:
    options = Options("x", sources=[SourceConfig("pg19")])
    assert json.loads(json.dumps(options.to_dict()))["sources"][0]["name"] == "pg19"
