"""Recall trials."""

from typing import Any

import pytest

from eval.eviction.recall import trials
from tests.models import token_ids


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_trial_states_a_fact_at_its_depth_and_asks_for_it_at_the_end(split: str, tiny_lm: Any) -> None:
    texts = [token_ids(60, seed) for seed in range(6)]
    found = trials(split, 6, 60, tiny_lm.tokenizer, texts, seed=5)
    assert [trial.depth for trial in found] == pytest.approx([1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12])
    for trial, text in zip(found, texts, strict=True):
        place = int(trial.depth * 60)
        assert list(trial.context[:place]) == text[:place].tolist()
        assert list(trial.context[len(trial.context) - 60 + place :]) == text[place:].tolist()
        stated = tiny_lm.tokenizer.decode(trial.context[place : len(trial.context) - 60 + place])
        assert tiny_lm.tokenizer.decode(trial.answer).strip() in stated
    assert (
        trials(split, 6, 60, tiny_lm.tokenizer, texts, seed=5)
        == found
        != trials(split, 6, 60, tiny_lm.tokenizer, texts)
    )
