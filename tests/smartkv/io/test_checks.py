"""Checks of tensors and of JSON values."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartkv.io.checks import LARGEST, all_finite, check_number, check_type, check_whole, differences, read_dataclass


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    wrong=st.sampled_from([math.nan, math.inf, -math.inf]),
    data=st.data(),
)
def test_one_element_that_is_not_finite_is_found_wherever_it_is(
    shape: list[int], dtype: torch.dtype, wrong: float, data: st.DataObject
) -> None:
    tensor = torch.randn(shape).to(dtype)
    assert all_finite(tensor)
    tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = wrong
    assert not all_finite(tensor)


@pytest.mark.parametrize("value", [2, LARGEST - 1])
def test_a_whole_number_is_given_back(value: int) -> None:
    assert check_whole("sinks", value, 2) == value


@pytest.mark.parametrize("value", [1, -3, LARGEST, True, 2.0, "2", None, [2]])
def test_what_is_no_whole_number_is_named_with_what_was_expected(value: Any) -> None:
    with pytest.raises(ValueError) as error:
        check_whole("sinks", value, 2)
    assert str(error.value) == f"sinks must be a whole number of at least 2, got {value!r}"


@pytest.mark.parametrize("value", [0, -1.5, 1e300])
def test_a_finite_number_is_given_back(value: float) -> None:
    assert check_number("price", value) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", None])
def test_what_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match="price must be a number, got"):
        check_number("price", value)


def test_a_value_of_another_type_is_named_with_the_one_expected() -> None:
    assert check_type("ages", [16], list) == [16]
    with pytest.raises(ValueError, match=r"ages must be a list, got \{'16': 1\}"):
        check_type("ages", {"16": 1}, list)


@dataclass
class Entry:
    """A line of a file."""

    file: str
    windows: int


def test_a_dataclass_is_read_from_its_fields() -> None:
    assert read_dataclass(Entry, {"windows": 3, "file": "a"}) == Entry("a", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"Entry must be a dict, got \[\]"),
        ({"file": "a"}, "fields file, windows, and differs in windows"),
        ({"file": "a", "windows": 1, "sha": "", "bytes": 2}, "fields file, windows, and differs in bytes, sha"),
        ({"file": 1, "windows": 1}, "file must be a str, got 1"),
        ({"file": "a", "windows": "1"}, "windows must be a whole number"),
        ({"file": "a", "windows": 0}, "windows must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_a_dataclass_is_named(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataclass(Entry, content, least=1)


def test_differences_name_each_setting_with_both_values() -> None:
    then = {"rate": 1, "goal": {"class_path": "Log4", "init_args": {"loss": "huber", "delta": 1.0}}, "gone": 1}
    now = {"rate": 2, "goal": {"class_path": "Log4", "init_args": {"loss": "mse", "delta": 1}}, "new": 2}
    assert differences(then, now) == ["rate 1, now 2", "goal.loss huber, now mse"]
    other = {"goal": {"class_path": "Ranking", "init_args": None}}
    assert differences(then, other) == ["goal Log4, now Ranking"]
    assert differences({"windows": {"train": 1}}, {"windows": {"train": 2}}) == [
        "windows {'train': 1}, now {'train': 2}"
    ]
