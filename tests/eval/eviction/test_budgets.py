"""`python -m eval budgets` on a tiny backbone: what is held and lost beside a fixed price, resuming, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.eviction import budgets as command
from smartkv import GateBank, LifespanCache, load_backbone
from smartkv.metrics.perplexity import window_nll
from smartkv.policies.floating_price import MOVES
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows
from tests.lightning_fixtures import write_texts

LENGTH, ASKED, WINDOW = 2 * MOVES, [0.5, 0.3], 8


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["test"])


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory, random_gates: Path) -> Path:
    bank, folder = GateBank.from_pretrained(random_gates), tmp_path_factory.mktemp("gates")
    policy = HybridPolicy((LayerRule("all", "gated", WINDOW),), sinks=2)
    bank.details |= {"policy": policy.to_dict(), "layer_shares": [[0.4, [0.5, 0.3]]]}
    bank.save_pretrained(folder)
    return folder


def measure(out: Path, backbone: Path, folder: Path, gates: Path, **changes: Any) -> dict[str, Any]:
    kinds = [{"name": "books", "windows": 3, "sources": [{"name": "mine", "path": str(folder)}]}]
    settings = {
        "out": out,
        "gates": gates,
        "backbone": backbone,
        "dtype": "float32",
        "texts": json.dumps(kinds),
        "lengths": json.dumps([LENGTH]),
        "footprints": json.dumps(ASKED),
    } | changes
    main(["budgets", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return json.loads((out / "budgets.json").read_text())


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path, gates: Path
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return out, measure(out, tiny_backbone, texts, gates)


def test_each_budget_is_held_and_the_fixed_price_holds_as_much(measured: tuple[Path, dict[str, Any]]) -> None:
    rows = measured[1]["rows"]
    assert [(row["kind"], row["length"], row["asked"]) for row in rows] == [("books", LENGTH, a) for a in ASKED]
    for row in rows:
        assert row["held"] == 3 * [pytest.approx(row["asked"], abs=0.005)]
        assert sum(row["held_fixed"]) / 3 == pytest.approx(row["asked"], rel=0.1)
        mean = sum(row["delta_nll"]) / 3
        assert row["documents"] == 3 and row["interval"][0] <= mean <= row["interval"][1]
        assert row["ratio"] == pytest.approx(mean / (sum(row["delta_nll_fixed"]) / 3))
    assert rows[0]["delta_nll"] != rows[0]["delta_nll_fixed"]


def test_a_text_of_twice_the_plan_stays_within_the_budget(measured: tuple[Path, dict[str, Any]]) -> None:
    for row in measured[1]["longer"]:
        assert (row["length"], row["read"]) == (LENGTH, 2 * LENGTH)
        assert row["held"] == [pytest.approx(row["asked"], abs=0.005)]


def test_the_loss_is_that_of_a_cache(
    measured: tuple[Path, dict[str, Any]], tiny_backbone: Path, texts: Path, gates: Path
) -> None:
    lm, bank = load_backbone(str(tiny_backbone), "float32"), GateBank.from_pretrained(gates)
    plan = plan_windows([SourceConfig("mine", path=str(texts))], {"test": 3}, lm.tokenizer, LENGTH + 1, 1, 0)
    tokens, first = plan.of_split("test")[0], LENGTH + 1 - round(0.75 * (LENGTH + 1))
    with LifespanCache(lm.model, bank, footprint=0.3, plan=LENGTH, rollback=0) as cache, torch.inference_mode():
        lost = window_nll(lm.model, tokens, first, cache) - window_nll(lm.model, tokens, first)
    assert measured[1]["rows"][1]["delta_nll"][0] == pytest.approx(lost, abs=1e-6)


def test_tables_and_pictures_are_left(measured: tuple[Path, dict[str, Any]]) -> None:
    out, _ = measured
    assert sorted(path.name for path in out.glob("*.png")) == [f"budgets_{LENGTH}.png"]
    assert "at twice the plan" in (out / "budgets.md").read_text()


def test_a_run_that_was_killed_goes_on(
    measured: tuple[Path, dict[str, Any]],
    tiny_backbone: Path,
    texts: Path,
    gates: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, before = measured
    monkeypatch.setattr(command, "window_nll", lambda *_: pytest.fail("a window was read again"))
    assert measure(out, tiny_backbone, texts, gates)["rows"] == before["rows"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": "[]"}, "give at least one kind"),
        ({"lengths": "[64]"}, "at least 128 tokens"),
        ({"lengths": "[600]"}, "longer than the model's 512 positions"),
        ({"footprints": "[1.5]"}, "above 0 and at most 1"),
        ({"footprints": "[0.05]"}, "footprint=0.05 of 128 planned tokens leaves 6 keys a KV head, but 10 always stay"),
        ({"scored": 1.0}, "scored is a share of a window"),
        ({"twice": -1}, "twice must be 0 or more"),
    ],
)
def test_a_mistake_is_one_line(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: Path,
    gates: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        measure(tmp_path / "out", tiny_backbone, texts, gates, **changes)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and said in error
