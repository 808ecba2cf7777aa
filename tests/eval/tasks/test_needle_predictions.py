"""What gates predict of the keys of a fact, by layer and head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.tasks.answers import Sample
from eval.tasks.needle_predictions import predictions
from smartkv import GateBank
from smartkv.models.key_hooks import read_keys


def sample(marked: tuple[int, int], seed: int) -> Sample:
    prompt = torch.randint(5, 60, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(tuple(prompt), (1,), ("",), (), marked=marked)


@torch.no_grad()
def test_means_are_those_of_plain_loops(lm: Any, long_gates: Path, tmp_path: Path) -> None:
    gates = GateBank.from_pretrained(long_gates)
    samples = [sample((3, 7), 0), sample((20, 30), 1)]
    found = predictions(lm, gates, samples)
    for layer in range(2):
        for head in range(2):
            inside, outside = [], []
            for each in samples:
                score = gates.score(layer, read_keys(lm.model, torch.tensor(each.prompt))[layer])[0, head]
                start, stop = each.marked or (0, 0)
                inside.append(float(score[start:stop].mean()))
                outside.append(float(torch.cat([score[:start], score[stop:]]).mean()))
            assert float(found.fact[layer, head]) == pytest.approx(sum(inside) / 2, abs=1e-5)
            assert float(found.text[layer, head]) == pytest.approx(sum(outside) / 2, abs=1e-5)
    told = found.to_dict()
    assert told["unit"] == "predicted time to live, tokens" and len(told["by_layer"]["fact"]) == 2
    assert found.picture(tmp_path).stat().st_size > 300


def test_gates_of_some_layers_that_judge_for_ages_are_told_in_nats(lm: Any) -> None:
    gates = GateBank(lm.fingerprint, [1], 8, 2, {"ages": [8, 24], "target": "log worth"})
    found = predictions(lm, gates, [sample((3, 7), 0)])
    assert found.layers == [1] and found.fact.shape == (1, 2) and "nats" in found.to_dict()["unit"]
    assert [column.header for column in found.table().columns] == ["layer", "fact", "text around it"]
