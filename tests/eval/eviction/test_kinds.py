"""`python -m eval kinds` on a tiny backbone: what is kept and lost of each kind of text, resuming, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.eviction import kinds as command
from smartkv import GateBank, LifespanCache, load_backbone
from smartkv.metrics.perplexity import window_nll
from smartkv.policies.budgets import policy_of
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows
from tests.lightning_fixtures import ROOT, write_texts

WINDOW, FIRST, TARGETS = 64, 20, [0.6, 0.45]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    lists = folder / "lists" / "test"
    lists.mkdir(parents=True)
    (lists / "a.txt").write_text("\n".join(f"{number}: {number**3}" for number in range(400)))
    return {"books": write_texts(folder / "books", splits=["test"]), "lists": lists.parent}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory, random_gates: Path) -> Path:
    bank, folder = GateBank.from_pretrained(random_gates), tmp_path_factory.mktemp("gates")
    policy = HybridPolicy((LayerRule("all", "gated", 8),), sinks=2)
    bank.details |= {"policy": policy.to_dict(), "prices": [[0.5, 0.1], [0.8, -0.1]]}
    bank.save_pretrained(folder)
    return folder


def measure(out: Path, backbone: Path, texts: dict[str, Path], gates: Path, **changes: Any) -> dict[str, Any]:
    kinds = [
        {"name": name, "windows": 3, "sources": [{"name": name + "-mine", "path": str(path)}]}
        for name, path in texts.items()
    ]
    settings = {
        "out": out,
        "gates": json.dumps([str(gates)]),
        "backbone": backbone,
        "dtype": "float32",
        "window": WINDOW,
        "score_from": FIRST,
        "windows_per_document": 1,
        "texts": json.dumps(kinds),
        "footprints": json.dumps(TARGETS),
    } | changes
    main(["kinds", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return json.loads((out / "kinds.json").read_text())


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: dict[str, Path], gates: Path
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return out, measure(out, tiny_backbone, texts, gates)


def test_every_kind_is_kept_equally(measured: tuple[Path, dict[str, Any]], texts: dict[str, Path], gates: Path) -> None:
    out, result = measured
    rows = {(row["contender"], row["kind"], row["target"]): row for row in result["rows"]}
    assert set(rows) == {(name, kind, t) for name in (str(gates), "window") for kind in texts for t in TARGETS}
    for row in rows.values():
        assert row["target"] - 0.1 < row["footprint"] < row["target"] + 0.03 and row["windows"] == 3
        first = rows[row["contender"], "books", row["target"]]
        assert first["documents"] == 3 and first["interval"][0] <= first["delta_nll"] <= first["interval"][1]
        ratio = row["delta_nll"] / first["delta_nll"] if first["interval"][0] > 0 else None
        assert row["times_first"] == (ratio if ratio is None else pytest.approx(ratio))
    assert rows["window", "lists", 0.45]["documents"] == 1 and rows["window", "lists", 0.45]["interval"] is None
    assert (out / "kinds.png").is_file() and "| lists |" in (out / "kinds.md").read_text()


def test_the_loss_is_that_of_a_cache_and_the_remembered_price_is_told(
    measured: tuple[Path, dict[str, Any]], tiny_backbone: Path, texts: dict[str, Path], gates: Path
) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    plan = plan_windows([SourceConfig("lists-mine", path=str(texts["lists"]))], {"test": 3}, lm.tokenizer, WINDOW, 4, 0)
    bank = GateBank.from_pretrained(gates)
    (row,) = [
        row
        for row in measured[1]["rows"]
        if (row["contender"], row["kind"], row["target"]) == (str(gates), "lists", 0.6)
    ]
    losses, kept = [], []
    for tokens in plan.of_split("test"):
        with (
            LifespanCache(lm.model, bank, policy_of(bank, 0.6), first_query=FIRST - 1) as cache,
            torch.inference_mode(),
        ):
            losses.append(window_nll(lm.model, tokens, FIRST, cache) - window_nll(lm.model, tokens, FIRST))
        kept.append(cache.footprint)
    assert row["remembered"] == pytest.approx(sum(kept) / 3, abs=0.03)
    assert row["nll_full"] == pytest.approx(sum(window_nll(lm.model, t, FIRST) for t in plan.of_split("test")) / 3)
    assert row["delta_nll"] != pytest.approx(sum(losses) / 3)  # at another price


def test_a_run_that_was_killed_goes_on(
    measured: tuple[Path, dict[str, Any]],
    tiny_backbone: Path,
    texts: dict[str, Path],
    gates: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> None:
        raise RuntimeError("measured again")

    monkeypatch.setattr(command, "evicted_nll", never)
    monkeypatch.setattr(command, "window_nll", never)
    assert measure(measured[0], tiny_backbone, texts, gates)["rows"] == measured[1]["rows"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"footprints": "[0.0]"}, "footprints are shares"),
        ({"score_from": 64}, "score_from must be at least 1 and below"),
        ({"texts": {}}, "there must be texts"),
        ({"footprints": "[0.01]"}, "no footprint can be kept"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: dict[str, Path],
    gates: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        measure(tmp_path, tiny_backbone, **{"texts": texts, "gates": gates} | changes)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_two_kinds_of_one_name_are_refused(
    tmp_path: Path, tiny_backbone: Path, gates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"name": "books", "windows": 1, "sources": [{"name": "builtin"}]}
    command = ["kinds", "--out", str(tmp_path), "--gates", json.dumps([str(gates)]), "--backbone", str(tiny_backbone)]
    with pytest.raises(SystemExit):
        main([*command, "--texts", json.dumps([text, text | {"split": "train"}])])
    assert "two texts are named 'books'" in capsys.readouterr().err


def test_gates_without_a_policy_are_refused(
    tmp_path: Path, tiny_backbone: Path, texts: dict[str, Path], random_gates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        measure(tmp_path, tiny_backbone, texts, random_gates)
    assert "remember no policy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kinds", "kinds_qwen"])
def test_a_config_prints_what_it_sets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs/eval" / f"{name}.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["kinds", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
    assert [text["name"] for text in printed["texts"]] == [text["name"] for text in written["texts"]]
    for key in ("out", "gates", "footprints", "measure", "model"):
        assert printed[key] == written[key]
