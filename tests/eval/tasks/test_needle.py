"""`python -m eval needle` on a tiny backbone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eval.eviction.recall import trial
from eval.tasks.needle import _sample as needle_sample
from tests.eval.tasks.fixtures import ALL, contenders
from tests.eval.tasks.test_ruler_generator import many_words


def test_the_needle_is_read_at_every_depth_and_length_by_everybody(run_task: Any, tmp_path: Path) -> None:
    changes = {"lengths": "[400, 600]", "depths": 3, "samples": 2, "new_tokens": 4}
    found = run_task("needle", tmp_path, **changes)
    assert contenders(found) == ALL
    for row in found["rows"]:
        groups = [tuple(sample["group"]) for sample in row["samples"]]
        assert sorted(set(groups)) == [(row["length"], round(place, 3)) for place in (1 / 6, 0.5, 5 / 6)]
        for sample in row["samples"]:
            assert sample["nll"] > 0 and sample["rank"] >= 0 and sample["right"] == (sample["rank"] == 0)
            assert (sample["generated"] is None) == (row["contender"] == "key_norm")
            assert (sample["kept"] is None) == (row["kind"] in ("full", "quantised") or row["contender"] == "key_norm")
        footprint = float(np.mean([sample["footprint"] for sample in row["samples"]]))
        assert footprint == pytest.approx(1.0 if row["kind"] in ("full", "quantised") else 0.5, abs=0.12)
    predicted = found["predicted"]
    assert predicted["layers"] == [0, 1] and predicted["unit"] == "predicted time to live, tokens"
    assert [len(heads) for heads in predicted["fact"]] == [2, 2] and len(predicted["by_layer"]["text"]) == 2
    for name in ("needle_right.png", "needle_nll.png", "needle_predicted.png", "needle.md"):
        assert (tmp_path / name).stat().st_size > 300


def test_the_marked_tokens_of_a_needle_are_its_statement(lm: Any, long_texts: Path) -> None:
    text = torch.tensor(lm.tokenizer(many_words(200, 1))["input_ids"][:600])
    made = trial("test", 0, 0.5, lm.tokenizer, text[:504], np.random.default_rng(0))
    sample = needle_sample(SimpleNamespace(lm=lm), made, 600, text)
    start, stop = sample.marked
    stated = lm.tokenizer.decode(sample.prompt[start:stop])
    assert sample.references[0] in stated and stated.strip().endswith(".")
