"""`python -m eval perplexity` on a tiny backbone: figures, resuming, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.eviction import perplexity as command
from smartkv import GateBank, load_backbone
from smartkv.metrics.perplexity import window_nll
from smartkv.policies.floating_price import MOVES
from smartkv.policies.named import read_policy
from smartkv.texts.sources import SourceConfig
from tests.lightning_fixtures import ROOT, write_texts

WINDOW, FIRST = 64, 20


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["train", "test"])


def measure(out: Path, backbone: Path, texts: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "out": out,
        "backbone": backbone,
        "dtype": "float32",
        "sources": json.dumps([{"name": "mine", "path": str(texts)}]),
        "window": WINDOW,
        "windows": 3,
        "score_from": FIRST,
        "calibration_windows": 2,
        "policies": '["all-gated", "window", "full"]',
        "footprints": "[0.7, 0.4, 0.25]",
    } | changes
    main(["perplexity", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return json.loads((out / "perplexity.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *args: Any, **changes: Any) -> str:
    """The one line on stderr of a run that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        measure(*args, **changes)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.startswith("error: ")
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path, random_gates: Path) -> Path:
    out = tmp_path_factory.mktemp("out")
    measure(out, tiny_backbone, texts, gates=random_gates)
    return out


def test_every_policy_is_measured_at_every_footprint_that_it_can_keep(measured: Path) -> None:
    rows = json.loads((measured / "perplexity.json").read_text())["frontier"]
    assert [(row["policy"], row["target"]) for row in rows] == [
        *(("all-gated", target) for target in (0.25, 0.4, 0.7)),
        *(("window", target) for target in (0.25, 0.4, 0.7)),
        ("full", None),
    ]
    for row in rows[:-1]:
        assert row["footprint"] == pytest.approx(row["target"], abs=0.05)
        assert row["interval"][0] <= row["delta_nll"] <= row["interval"][1]


def test_a_budget_holds_what_was_asked(tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path) -> None:
    options = {"policies": '["gates@budget"]', "window": 4 * MOVES + 1, "windows": 2}
    rows = measure(tmp_path, tiny_backbone, texts, gates=random_gates, **options)["frontier"]
    assert [row["policy"] for row in rows] == 3 * ["gates@budget"]
    for row in rows:
        assert row["held"] == pytest.approx(row["target"], abs=0.002)
        assert row["footprint"] > row["held"]  # all keys stay until the budget is reached


def test_a_full_policy_loses_nothing_and_costs_no_less_than_the_full_cache(measured: Path) -> None:
    row = json.loads((measured / "perplexity.json").read_text())["frontier"][-1]
    assert row["delta_nll"] == pytest.approx(0, abs=1e-5) and row["footprint"] == 1.0
    assert row["peak_bytes"] > row["peak_bytes_full"] == 2 * 2 * 2 * 8 * 4 * (WINDOW - 1)


def test_the_full_cache_s_figure_is_the_plain_one(measured: Path, tiny_backbone: Path, texts: Path) -> None:
    content = json.loads((measured / "perplexity.json").read_text())
    lm = load_backbone(str(tiny_backbone), "float32")
    source = SourceConfig("mine", path=str(texts))
    plan = command.plan_windows([source], {"train": 2, "test": 3}, lm.tokenizer, WINDOW, seed=0)
    want = [window_nll(lm.model, tokens, FIRST) for tokens in plan.of_split("test")]
    assert content["nll_full"] == pytest.approx(sum(want) / 3, abs=1e-6)


def test_it_leaves_two_pictures(measured: Path) -> None:
    assert sorted(path.name for path in measured.glob("*.png")) == ["footprint_by_layer.png", "frontier.png"]


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(
    measured: Path,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: Path,
    random_gates: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = command.evicted_nll, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(command, "evicted_nll", counted)
    with pytest.raises(SystemExit):  # after the line that says how to go on
        measure(tmp_path, tiny_backbone, texts, gates=random_gates)
    again = measure(tmp_path, tiny_backbone, texts, gates=random_gates)
    assert len(calls) == 7 * 3 + 1  # each window of each point once, and the one that was interrupted
    assert again["frontier"] == json.loads((measured / "perplexity.json").read_text())["frontier"]


def test_other_gates_are_measured_anew(tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path) -> None:
    options = {"policies": "[all-gated]", "footprints": "[0.4]"}
    first = measure(tmp_path / "out", tiny_backbone, texts, gates=random_gates, **options)
    torch.manual_seed(5)
    other = tmp_path / "gates"
    GateBank(load_backbone(str(tiny_backbone)).fingerprint).save_pretrained(other)
    second = measure(tmp_path / "out", tiny_backbone, texts, gates=other, **options)
    assert first["frontier"][0]["delta_nll"] != second["frontier"][0]["delta_nll"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no gates were given"),
        ({"policies": "[windows]"}, "neither one of"),
        ({"policies": "[window]", "footprints": "[1.5]"}, "above 0 and at most 1"),
        ({"policies": "[window]", "footprints": "[0.001]"}, "no policy can keep any of the footprints"),
        ({"score_from": WINDOW}, "below the window of 64 tokens"),
        ({"policies": "[window]", "window": 400}, "no train window of 400 tokens"),
        ({"policies": "[window]", "window": 1000}, "longer than the model's 512 positions"),
        ({"policies": "[window]", "windows": 0}, "must be at least 1"),
    ],
)
def test_a_mistake_is_told_before_any_forward_pass(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "window_nll", None)  # calling it would be another error
    short = (
        write_texts(tmp_path / "short", splits=["train", "test"], files=1) if changes.get("window") == 400 else texts
    )
    if changes.get("window") == 400:
        for path in short.rglob("*.txt"):
            path.write_text(path.read_text()[:200])
    assert said in refused(capsys, tmp_path / "out", tiny_backbone, short, **changes)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs/policies").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_written_policy_fits_the_model_that_the_configs_use(path: Path) -> None:
    assert read_policy(path, 30).open == "window"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("perplexity.yaml")), ids=lambda path: path.parent.name)
def test_the_config_runs(path: Path, tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path) -> None:
    written = yaml.safe_load(path.read_text())
    config = tmp_path / "config.yaml"
    small = {"window": WINDOW, "windows": 1, "score_from": FIRST, "calibration_windows": 1, "footprints": [0.4, 0.7]}
    sources = [{"name": "mine", "path": str(texts)}]
    tiny = {"out": str(tmp_path / "out"), "gates": str(random_gates), "backbone": str(tiny_backbone), "split": "test"}
    config.write_text(yaml.safe_dump(small | tiny | {"sources": sources, "dtype": "float32"}))
    main(["perplexity", "--config", str(path), "--config", str(config)])
    rows = json.loads((tmp_path / "out/perplexity.json").read_text())["frontier"]
    assert {row["policy"] for row in rows} <= set(written["policies"]) and rows
