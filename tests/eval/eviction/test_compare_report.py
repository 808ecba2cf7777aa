"""What `python -m eval compare` makes of its readings, and how contenders read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from eval.common.console import make_console
from eval.common.resume import Measurements
from eval.contenders.registry import make_contenders
from eval.contenders.scored import ScoredContender, lifetimes_once, price_for_share
from eval.eviction.compare import Runner
from eval.eviction.compare_report import Row, recall_share, report
from eval.eviction.recall import Trial, trials
from smartkv import GateBank, HybridPolicy, LayerRule, load_backbone
from smartkv.baselines.oracles import oracle_labels
from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import token_losses
from smartkv.policies.lifetimes import FOREVER
from tests.models import token_ids

WINDOW, FIRST = 64, 20


# -- what is made of the readings -------------------------------------------------------------------------------------


def row(name: str, kind: str, footprint: float, nll: list[float], right: list[bool]) -> Row:
    texts = {"books": [{"nll": value, "footprint": footprint, "peak_bytes": None} for value in nll]}
    recall = [{"nll": 1.0, "footprint": footprint, "right": value} for value in right]
    return Row(name, kind, "keys", footprint, footprint, texts, recall)


FULL = row("full", "full", 1.0, [3.0, 2.0], [True, True, False, True])


def test_recall_is_the_share_of_what_the_full_cache_recalls() -> None:
    found = recall_share(row("mine", "ours", 0.2, [3.1, 2.1], [True, False, True]), FULL)
    assert found["asked"] == 3 and found["right"] == pytest.approx(2 / 3)
    with pytest.raises(SmartKVError, match="was asked other facts"):
        recall_share(row("mine", "ours", 0.2, [3.1, 2.1], [True] * 4), FULL)


def test_the_gap_to_the_oracle_and_to_the_window_are_plain_ratios(tmp_path: Path) -> None:
    rows = [
        FULL,
        row("mine", "ours", 0.25, [3.04, 2.06], [True] * 3),
        *(row("window", "rule", f, [3 + d, 2 + d], [False] * 3) for f, d in ((0.25, 0.1), (0.5, 0.05))),
        *(row("oracle:attention", "oracle", f, [3 + d, 2 + d], [True] * 3) for f, d in ((0.2, 0.02), (0.3, 0.02))),
        *(row(f"random:{seed}", "rule", 0.25, [3.2 + seed, 2.2], [seed == 0] * 3) for seed in (0, 1)),
    ]
    report(make_console(), tmp_path, {"backbone": "b", "window": 64, "device": "cpu"}, rows, {"books": [0, 1]})
    found = {(r["contender"], r["target"]): r for r in json.loads((tmp_path / "compare.json").read_text())["rows"]}
    mine = found["mine", 0.25]["texts"]["books"]
    assert mine["delta_nll"] == pytest.approx(0.05) and mine["ratio"] == pytest.approx(0.5)
    assert mine["gap_recovered"]["attention"] == pytest.approx((0.1 - 0.05) / (0.1 - 0.02))
    assert found["random", 0.25]["texts"]["books"]["delta_nll"] == pytest.approx(0.45)
    assert found["random", 0.25]["recall"]["right"] == 0.5
    assert (tmp_path / "recall.png").exists()


def test_nobody_is_asked_what_the_full_cache_cannot_recall(tmp_path: Path, lm: Any) -> None:
    ids = token_ids(60, 5).tolist()
    with torch.inference_mode():
        told = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
    asked = [Trial(tuple(ids[:50]), tuple(ids[50:]), (answer,), 0.5) for answer in (told + 1, told, told + 2)]
    contenders = make_contenders(["window"], lm, None, [token_ids(60, 6)], FIRST)
    with Progress() as progress:
        runner = Runner(Measurements(tmp_path / "cells", {}), progress, FIRST, None, {}, "")
        full, window = runner.run(contenders, [0.8], [0.8], {}, asked)
    assert [trial["right"] for trial in full.recall] == [False, True, False]
    assert len(window.recall) == 1 and recall_share(window, full)["asked"] == 1


# -- contenders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tiny_backbone: Path) -> Any:
    return load_backbone(str(tiny_backbone), "float32")


def test_scores_above_the_price_stay_and_nothing_else(lm: Any) -> None:
    """Beside a mask in plain loops would be beside the cache's own tests: here, that the table reaches the cache."""
    ids, table = token_ids(40, 3), torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(0))
    contender = ScoredContender(lm, "mine", "rule", "keys", lambda _: table, [ids], 10, window=4, sinks=2)
    found = contender.read(0.3, ids, 11, 10, None)
    seen = full = 0
    for query in range(10, 39):
        for key in range(query + 1):
            seen += float((table[..., key] > 0.3).float().mean()) if key >= 2 and query - key >= 4 else 1
            full += 1
    assert found.footprint == pytest.approx(seen / full, abs=1e-6)
    everything = contender.read(-100.0, ids, 11, 10, None)
    torch.testing.assert_close(everything.nll, token_losses(lm.model, ids, 11).nll, atol=1e-4, rtol=0)
    assert (found.nll - everything.nll).abs().max() > 1e-3


def test_once_the_prefill_is_over_its_cheap_keys_go_and_later_ones_stay() -> None:
    policy = HybridPolicy((LayerRule("all", "gated", 3),), sinks=2)
    table = torch.arange(20.0)[None, None] % 7
    price = price_for_share([table], 0.5, 12, policy)
    ttl = lifetimes_once(table, price, 12, policy)[0, 0]
    kept = [key for key in range(12) if ttl[key] == FOREVER or key < 2]
    assert len(kept) in (6, 7) and {9, 10, 11} <= set(kept) and (ttl[12:] == FOREVER).all()
    assert all(ttl[key] == 12 - key for key in range(2, 12) if key not in kept)
    open_keys = [float(table[0, 0, key]) for key in range(2, 9)]
    assert min(table[0, 0, key] for key in kept if 2 <= key < 9) >= sorted(open_keys)[-2]


def test_the_oracle_s_scores_are_what_is_to_come_and_the_null_s_what_was(lm: Any, random_gates: Path) -> None:
    windows = [token_ids(WINDOW, 1), token_ids(WINDOW, 2)]
    gates = GateBank.from_pretrained(random_gates)
    names = ["oracle:attention", "oracle:lifespan", "null:constant"]
    _, attention, lifespan, constant = make_contenders(names, lm, gates, windows, FIRST)
    want = oracle_labels(lm.model, windows[1], 32)
    torch.testing.assert_close(attention.tables[1], want.attention)
    torch.testing.assert_close(lifespan.tables[1], want.lifespan.float().log2() / 2)
    half = torch.stack([oracle_labels(lm.model, w, 32).lifespan[..., : WINDOW // 2] for w in windows])
    half = half.clamp(max=WINDOW // 2).float().log2() / 2
    torch.testing.assert_close(constant.tables[0][..., 0], half.mean(dim=(0, 3)))
    assert constant.tables[0].std(dim=-1).max() < 1e-6


# -- trials -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_trial_states_a_fact_at_its_depth_and_asks_for_it_at_the_end(split: str, lm: Any) -> None:
    texts = [token_ids(60, seed) for seed in range(6)]
    found = trials(split, 6, 60, lm.tokenizer, texts, seed=5)
    assert [trial.depth for trial in found] == pytest.approx([1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12])
    for trial, text in zip(found, texts, strict=True):
        place = int(trial.depth * 60)
        assert list(trial.context[:place]) == text[:place].tolist()
        assert list(trial.context[len(trial.context) - 60 + place :]) == text[place:].tolist()
        stated = lm.tokenizer.decode(trial.context[place : len(trial.context) - 60 + place])
        assert lm.tokenizer.decode(trial.answer).strip() in stated
    assert trials(split, 6, 60, lm.tokenizer, texts, seed=5) == found != trials(split, 6, 60, lm.tokenizer, texts)
