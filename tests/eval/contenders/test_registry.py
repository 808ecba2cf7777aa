"""Contenders by name."""

from pathlib import Path
from typing import Any

import torch

from eval.contenders.registry import make_contenders
from smartkv import GateBank
from smartkv.baselines.oracles import oracle_labels
from tests.models import token_ids

WINDOW, FIRST = 64, 20


def test_the_oracle_s_scores_are_what_is_to_come_and_the_null_s_what_was(tiny_lm: Any, random_gates: Path) -> None:
    windows = [token_ids(WINDOW, 1), token_ids(WINDOW, 2)]
    gates = GateBank.from_pretrained(random_gates)
    names = ["oracle:attention", "oracle:lifespan", "null:constant"]
    _, attention, lifespan, constant = make_contenders(names, tiny_lm, gates, windows, FIRST)
    want = oracle_labels(tiny_lm.model, windows[1], 32)
    torch.testing.assert_close(attention.tables[1], want.attention)
    torch.testing.assert_close(lifespan.tables[1], want.lifespan.float().log2() / 2)
    half = torch.stack([oracle_labels(tiny_lm.model, w, 32).lifespan[..., : WINDOW // 2] for w in windows])
    half = half.clamp(max=WINDOW // 2).float().log2() / 2
    torch.testing.assert_close(constant.tables[0][..., 0], half.mean(dim=(0, 3)))
    assert constant.tables[0].std(dim=-1).max() < 1e-6
