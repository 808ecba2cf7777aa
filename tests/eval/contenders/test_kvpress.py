"""NVIDIA's presses as contenders, and gates in one. What needs kvpress runs by `make test-kvpress`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.contenders.base import FullCache
from eval.contenders.kvpress import NEEDS, PREFIX, SINKS, WINDOW, PressContender, _footprint
from eval.contenders.scored import GateScores, ScoredContender
from smartkv import GateBank, load_backbone
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import write_texts
from tests.models import token_ids

CONFIG = Path(__file__).parents[3] / "configs/eval/presses.yaml"
needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="needs kvpress: make test-kvpress")
TOKENS, PREFILL = 120, 90


def pressed(backbone: Path, gates: Path, name: str) -> PressContender:
    lm = load_backbone(str(backbone), "float32")
    windows = [token_ids(TOKENS, seed, 256) for seed in (5, 6)]
    return PressContender(lm, GateBank.from_pretrained(gates, lm.model), PREFIX + name, windows, PREFILL)


@needs_kvpress
@pytest.mark.parametrize("name", NEEDS)
def test_a_press_keeps_the_share_and_loses_something(name: str, tiny_backbone: Path, random_gates: Path) -> None:
    contender, tokens = pressed(tiny_backbone, random_gates, name), token_ids(TOKENS, 1, 256)
    full = FullCache(contender.lm).read(1.0, tokens, PREFILL, PREFILL - 1, PREFILL)
    found = contender.read(contender.solved(0.5), tokens, PREFILL, PREFILL - 1, PREFILL)
    want = _footprint(0.5 * PREFILL, PREFILL, PREFILL - 1, TOKENS - 1)
    assert found.footprint == pytest.approx(want, abs=0.08 if name == "dms_lifespan" else 0.02)
    assert found.nll.shape == full.nll.shape
    assert torch.allclose(found.nll[0], full.nll[0], atol=1e-4)  # told by the prefill, which saw all
    assert not torch.allclose(found.nll, full.nll, atol=1e-3)


@needs_kvpress
def test_a_press_that_keeps_all_is_the_full_cache(tiny_backbone: Path, random_gates: Path) -> None:
    contender, tokens = pressed(tiny_backbone, random_gates, "lifespan"), token_ids(TOKENS, 1, 256)
    full = FullCache(contender.lm).read(1.0, tokens, PREFILL, PREFILL - 1, PREFILL)
    found = contender.read({"compression_ratio": 0.0}, tokens, PREFILL, PREFILL - 1, PREFILL)
    torch.testing.assert_close(found.nll, full.nll, atol=1e-4, rtol=1e-4)
    assert found.footprint == pytest.approx(1.0)


@needs_kvpress
def test_a_random_press_draws_the_same_again_and_another_for_every_layer(
    tiny_backbone: Path, random_gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpress import RandomPress

    contender, tokens = pressed(tiny_backbone, random_gates, "random"), token_ids(TOKENS, 1, 256)
    drawn, score = [], RandomPress.score

    def watched(*given: Any) -> torch.Tensor:
        drawn.append(score(*given))
        return drawn[-1]

    monkeypatch.setattr(RandomPress, "score", watched)
    state = torch.get_rng_state()
    nll = [contender.read(contender.solved(0.5), tokens, PREFILL, PREFILL - 1, PREFILL).nll for _ in range(2)]
    assert torch.equal(*nll) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn[0], drawn[1])


@needs_kvpress
def test_streaming_llm_of_kvpress_is_ours(tiny_backbone: Path, random_gates: Path) -> None:
    from smartkv.baselines import Once, StreamingLLM, simulated_eviction
    from smartkv.metrics.perplexity import token_losses

    contender, tokens = pressed(tiny_backbone, random_gates, "streaming_llm"), token_ids(TOKENS, 1, 256)
    found = contender.read({"compression_ratio": 0.5}, tokens, PREFILL, PREFILL - 1, PREFILL)
    with simulated_eviction(
        contender.lm.model, StreamingLLM(), Once(PREFILL, PREFILL // 2, PREFILL // 2 - 4, 4)
    ) as simulation:
        ours = token_losses(contender.lm.model, tokens, PREFILL).nll
    torch.testing.assert_close(found.nll, ours, atol=1e-4, rtol=1e-4)
    assert found.footprint == pytest.approx(float(simulation.footprint_by_head(PREFILL - 1).mean()), abs=1e-6)


@needs_kvpress
def test_one_price_in_dms_press_is_one_price_in_ours(tiny_backbone: Path, random_gates: Path) -> None:
    contender, tokens = pressed(tiny_backbone, random_gates, "dms_lifespan"), token_ids(TOKENS, 1, 256)
    lm, scores = contender.lm, GateScores(contender.lm, contender._gates)
    ours = ScoredContender(lm, "ours", "ours", "keys", scores, [], PREFILL, WINDOW, SINKS, protocol="once")
    price = contender.solved(0.5)["threshold"]
    found = contender.read({"threshold": price}, tokens, PREFILL, PREFILL - 1, PREFILL)
    want = ours.read(price, tokens, PREFILL, PREFILL - 1, PREFILL)
    torch.testing.assert_close(found.nll, want.nll, atol=1e-4, rtol=1e-4)
    assert found.footprint == pytest.approx(want.footprint, abs=1e-6)


@needs_kvpress
def test_the_config_runs(tmp_path: Path, tiny_backbone: Path, random_gates: Path) -> None:
    written = yaml.safe_load(CONFIG.read_text())
    mine = [{"name": "mine", "path": str(write_texts(tmp_path / "texts", splits=["train", "test"]))}]
    small: dict[str, Any] = {"window": 120, "prefill": 90, "calibration_windows": 1, "footprints": [0.6]}
    sources = {
        "texts": [text | {"windows": 1, "sources": mine} for text in written["texts"]],
        "recall": {"trials": 2, "tokens": 100},
        "haystack": mine,
        "calibration": mine,
        "windows_per_document": 20,
        "dtype": "float32",
    }
    tiny = {"out": str(tmp_path / "out"), "gates": str(random_gates), "backbone": str(tiny_backbone)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small | tiny | sources))
    main(["compare", "--config", str(CONFIG), "--config", str(config)])
    rows = json.loads((tmp_path / "out/compare.json").read_text())["rows"]
    assert [row["contender"] for row in rows if row["kind"] == "ours"] == [
        "press:lifespan", "press:ada_lifespan", "press:dms_lifespan",
    ]  # fmt: skip
    assert {row["contender"] for row in rows} == set(written["contenders"])


def test_every_press_of_the_config_is_known() -> None:
    assert set(yaml.safe_load(CONFIG.read_text())["contenders"]) == {PREFIX + name for name in NEEDS}


def test_an_unknown_press_is_refused(tiny_backbone: Path, random_gates: Path) -> None:
    with pytest.raises(SmartKVError, match="there is no 'press:nothing'"):
        pressed(tiny_backbone, random_gates, "nothing")


def test_our_press_needs_gates(tiny_backbone: Path) -> None:
    with pytest.raises(SmartKVError, match="needs gates: give --gates"):
        PressContender(load_backbone(str(tiny_backbone), "float32"), None, "press:lifespan", [], PREFILL)


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is here")
def test_who_has_no_kvpress_is_told_how_to_get_it(tiny_backbone: Path, random_gates: Path) -> None:
    with pytest.raises(SmartKVError, match=r"needs kvpress: pip install 'smartkv\[kvpress\]'"):
        pressed(tiny_backbone, random_gates, "knorm")


def test_the_footprint_counts_the_prefill_in_full() -> None:
    seen = [10 + 1, 4 + 1, 4 + 2]  # the query at place 10 sees eleven keys; four were kept, and the later ones
    assert _footprint(4, 11, 10, 13) == pytest.approx(sum(seen) / (11 + 12 + 13))
