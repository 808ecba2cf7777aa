"""The order in which scores put keys, against plain recomputation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smartkv import GateBank
from smartkv.metrics.ranking import concordance, top_share
from smartkv.shards.labelled_keys import LabelledKeys


def test_order_is_that_of_the_scores_on_each_window(
    demo_run: Path, demo_scores: dict[str, Any], demo_rows: LabelledKeys
) -> None:
    gates, order = GateBank.from_pretrained(demo_run / "gates" / "export"), demo_scores["order"]["scores"]
    pairs, held, best = [], [], []
    for block in demo_rows.blocks("validation"):
        with torch.no_grad():
            score = gates(demo_rows.keys(block).float())[..., 0]
        labels = demo_rows.labels(block)
        pairs.append(float(concordance(score, labels.log4_lifespan).nanmean()))
        future = labels.future_attention[0]
        future, score = (part[:, ~future.isnan().any(dim=0)] for part in (future, score))
        held.append(float(top_share(score, future, 0.25)[1]))
        best.append(float(top_share(future, future, 0.25)[1]))
    assert order["gates"]["concordance"]["mean"] == pytest.approx(sum(pairs) / len(pairs))
    assert order["gates"]["top_25_all"]["mean"] == pytest.approx(sum(held) / len(held))
    assert order["oracle"]["top_25_all"]["mean"] == pytest.approx(sum(best) / len(best))
    assert order["constant"]["concordance"]["mean"] == 0.5
    for name in ("gates", "token_table", "position", "constant", "random"):
        assert order[name]["top_10"]["mean"] < order["oracle"]["top_10"]["mean"]
