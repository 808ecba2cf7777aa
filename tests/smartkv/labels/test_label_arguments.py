"""Wrong arguments of `LabelSpec` and `label_window` are refused in one line."""

from typing import Any

import pytest
import torch

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, label_window
from tests.models import llama, token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": 0.05}, r"thresholds must be a tuple, got 0\.05: write thresholds=\(0\.05,\)"),
        ({"thresholds": 0.2}, r"write thresholds=\(0\.2,\)"),
        ({"thresholds": "0.2"}, r"thresholds must be a tuple, got '0\.2': write thresholds=\(0\.05,\)"),
        ({"thresholds": ("0.05",)}, "between 0 and 1"),
        ({"thresholds": (float("nan"),)}, "between 0 and 1"),
        ({"thresholds": (True,)}, "between 0 and 1"),
        ({"ages": 16}, r"ages must be a tuple, got 16: write ages=\(16,\)"),
        ({"ages": 32}, r"write ages=\(32,\)"),
        ({"ages": "32"}, r"write ages=\(16,\)"),
        ({"ages": (1.5,)}, "ages must be whole numbers of at least 1 token"),
        ({"follow_up": 12.5}, r"follow_up must be a whole number of at least 1 token, got 12\.5"),
        ({"follow_up": None}, "follow_up must be a whole number .*, got None"),
    ],
    ids=lambda value: str(value).replace("\\", ""),
)
def test_settings_of_a_wrong_type_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        LabelSpec(**settings)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("some text", r'got a str: give tokenizer\(text\)\["input_ids"\]'),
        ({"input_ids": [1, 2]}, r'got a dict: give its \["input_ids"\]'),
        (token_ids(8)[None], r"got torch\.int64 \[1, 8\]: one window at a time, give tokens\[0\]"),
        ([[1, 2], [3, 4]], r"got torch\.int64 \[2, 2\]: one window"),
        (torch.tensor(3), r"got torch\.int64 \[\]"),
        ([0.5, 1.5], r"got torch\.float32 \[2\]"),
        ([True, False], r"got torch\.bool \[2\]$"),
        ([None], "got a list"),
        (None, "got None"),
        ([1, 64], "ids from 0 to 63 of this model, got 1 to 64"),
        ([-1, 3], "ids from 0 to 63 of this model, got -1 to 3"),
        ([], "at least 1 token, got 0"),
    ],
    ids=lambda value: str(value).replace("\\", ""),
)
def test_what_is_no_window_of_ids_is_refused(tokens: Any, message: str) -> None:
    with pytest.raises(SmartKVError, match=message) as refusal:
        label_window(llama(), tokens, LabelSpec())
    assert "\n" not in str(refusal.value)


def test_labels_without_a_spec_are_refused() -> None:
    with pytest.raises(SmartKVError, match=r"spec must be a LabelSpec, got 0\.05"):
        label_window(llama(), token_ids(8), 0.05)  # type: ignore[arg-type]


def test_a_window_of_one_token_again_and_again_is_a_window() -> None:
    assert label_window(llama(), [5, 5, 5], LabelSpec()).horizon.tolist() == [2, 1, 0]
