"""Perplexity under eviction while gates are trained: the figures, when they are taken, and on two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smartkv import HybridPolicy, LayerRule, load_backbone
from smartkv.metrics.perplexity import evicted_nll, full_cache_bytes, window_nll
from smartkv.policies import floating_price
from smartkv.texts.windows import read_plan
from tests.lightning_fixtures import (
    ROOT,
    error_line,
    fit,
    gates_config,
    last_logged,
    logged,
    refused,
    run_cli,
    run_command,
    write_config,
)

FIRST = 32
SETTINGS: dict[str, Any] = {
    "footprints": [0.3, 0.6],
    "windows": 3,
    "calibration_windows": 2,
    "every_n_epochs": 1,
    "max_share": 1.0,
    "dtype": "float32",
}


def callback(**changes: Any) -> dict[str, Any]:
    return {"class_path": "HybridCachePerplexity", "init_args": SETTINGS | changes}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    root = tmp_path_factory.mktemp("fit") / "run"
    export = {"class_path": "GateExport", "init_args": {"out": str(root / "export")}}
    board = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(root), "name": "", "version": "board"}}
    csv = {"class_path": "CSVLogger", "init_args": {"save_dir": str(root), "name": "", "version": ""}}
    fit(tiny_shards, root, callbacks=[callback(), export], trainer={"logger": [csv, board]})
    return root


def test_every_validation_gives_figures_of_each_policy_and_footprint(fitted: Path) -> None:
    names = [f"{policy}_{footprint}" for policy in ("window", "all-gated") for footprint in (0.3, 0.6)]
    for figure in ("perplexity", "delta_nll", "footprint", "held", "peak_bytes"):
        found = [row for row in logged(fitted) if f"val_{figure}/window_0.3" in row]
        assert len(found) == 2  # epochs
        assert all(f"val_{figure}/{name}" in row for name in names for row in found)


def test_the_window_has_the_figures_of_the_plain_functions(
    fitted: Path, tiny_shards: Path, tiny_backbone: Path
) -> None:
    model = load_backbone(str(tiny_backbone), "float32").model
    windows = read_plan(tiny_shards).of_split("validation")
    full = torch.tensor([window_nll(model, tokens, FIRST) for tokens in windows], dtype=torch.float64).mean()
    found = last_logged(fitted)
    assert found["val_perplexity/full"] == pytest.approx(float(full.exp()), rel=1e-6)
    assert found["val_peak_bytes/full"] == full_cache_bytes(model, windows.shape[1] - 1)
    # the longest window that keeps 0.3: queries 31 … 62 hold 47.5 keys in the mean
    policy = HybridPolicy((LayerRule("all", "window", int(0.3 * 47.5 - 4)),))
    own = [evicted_nll(model, None, policy, tokens, FIRST) for tokens in windows]
    assert found["val_footprint/window_0.3"] == pytest.approx(float(own[0].footprint.mean()))
    delta = torch.tensor([w.nll for w in own], dtype=torch.float64).mean() - full
    assert found["val_delta_nll/window_0.3"] == pytest.approx(float(delta), abs=1e-6)


def test_gates_keep_about_what_was_asked_and_change_as_they_are_trained(fitted: Path) -> None:
    rows = [row for row in logged(fitted) if "val_footprint/all-gated_0.6" in row]
    assert all(row["val_footprint/all-gated_0.6"] == pytest.approx(0.6, abs=0.06) for row in rows)
    assert rows[0]["val_delta_nll/all-gated_0.6"] != rows[1]["val_delta_nll/all-gated_0.6"]


def test_tensorboard_has_the_frontier(fitted: Path) -> None:
    events = EventAccumulator(str(fitted / "board"))
    events.Reload()
    assert [event.step for event in events.Images("eviction/frontier")] == [9, 19]
    assert len(events.Scalars("val_delta_nll/all-gated_0.3")) == 2


def test_a_run_that_may_not_be_slowed_measures_once_at_its_end(tmp_path: Path, tiny_shards: Path) -> None:
    trainer = {"max_epochs": 4}
    fit(tiny_shards, tmp_path / "run", trainer=trainer, callbacks=[callback(max_share=0.0, every_n_epochs=1)])
    found = [row for row in logged(tmp_path / "run") if "val_delta_nll/window_0.3" in row]
    # the first is allowed, for nothing was spent yet; every later one is left out but the run's last
    assert [row["step"] for row in found] == [9, 39]
    fit(tiny_shards, tmp_path / "rare", callbacks=[callback(every_n_epochs=5)])
    found = [row for row in logged(tmp_path / "rare") if "val_delta_nll/window_0.3" in row]
    assert len(found) == 1 and found[0]["step"] == 19


def test_each_of_several_policies_is_measured(tmp_path: Path, tiny_shards: Path) -> None:
    policies = ["all-gated", str(ROOT / "configs/policies/hybrid.yaml")]
    fit(tiny_shards, tmp_path / "run", trainer={"max_epochs": 1}, callbacks=[callback(policy=policies)])
    found = last_logged(tmp_path / "run")
    for name in ("all-gated_0.3", "hybrid_0.3", "all-gated_0.6", "hybrid_0.6"):
        assert found[f"val_footprint/{name}"] == pytest.approx(float(name[-3:]), abs=0.06)
        assert f"val_delta_nll/{name}" in found


def test_a_budget_is_held_and_stands_beside_what_was_asked(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floating_price, "MOVES", 7)  # windows of 64 tokens would see no move before their end
    policies = ["gates@budget", "all-gated"]
    fit(
        tiny_shards,
        tmp_path / "run",
        trainer={"max_epochs": 1},
        callbacks=[callback(policy=policies, footprints=[0.5, 0.7])],
    )
    found = last_logged(tmp_path / "run")
    for asked in (0.5, 0.7):
        assert found[f"val_held/gates@budget_{asked}"] == pytest.approx(asked, abs=0.02)
        assert 0 < found[f"val_held/all-gated_{asked}"] < 1
        assert found[f"val_footprint/gates@budget_{asked}"] > asked  # all keys stay until the budget is reached


def test_validate_measures_too(tmp_path: Path, tiny_shards: Path) -> None:
    root = tmp_path / "run"
    keep = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(root / "checkpoints"), "save_last": True}}
    fit(tiny_shards, root, callbacks=[callback(), keep])
    config = write_config(tmp_path / "v.yaml", gates_config(tiny_shards, tmp_path / "v", callbacks=[callback(), keep]))
    run_cli("validate", "-c", config, "--ckpt_path", root / "checkpoints/last.ckpt")
    for name in ("val_delta_nll/all-gated_0.3", "val_perplexity/full"):
        assert last_logged(tmp_path / "v")[name] == pytest.approx(last_logged(root)[name], abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_the_figures_of_one(tmp_path: Path, tiny_shards: Path) -> None:
    for devices in (1, 2):
        root = tmp_path / f"run{devices}"
        trainer = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "max_epochs": 1}
        config = write_config(
            root.with_suffix(".yaml"), gates_config(tiny_shards, root, trainer=trainer, callbacks=[callback()])
        )
        run_command("fit", "-c", config)
    one, two = (last_logged(tmp_path / f"run{devices}") for devices in (1, 2))
    for name in one:
        if name.startswith(("val_delta_nll", "val_footprint", "val_held", "val_perplexity", "val_peak_bytes")):
            tolerance = 1e-6 if "all-gated" not in name else 1e-3  # gates differ in the last bits
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"footprints": [0.0]}, "shares of the full cache"),
        ({"windows": 0}, "at least 1"),
        ({"policy": "gates@budget"}, "gates@budget always keeps 20 keys a head, more than a footprint of 0.3"),
        ({"max_share": 2.0}, "max_share is a share"),
        ({"score_from": 64}, "below the window of 64 tokens"),
        ({"policy": "nothing"}, "neither one of"),
        ({"policy": "full"}, "leaves nothing open"),
        ({"policy": ["all-gated", "full"]}, "policy 'full' leaves nothing open"),
        ({"policy": ["all-gated", "all-gated"]}, "a list of policies with different names"),
        ({"policy": []}, "a list of policies with different names"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(
    changes: dict[str, Any], said: str, tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = gates_config(tiny_shards, tmp_path / "run", callbacks=[callback(**changes)])
    assert said in error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "c.yaml", config)))


def test_gates_of_some_layers_cannot_gate_all(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = gates_config(tiny_shards, tmp_path / "run", callbacks=[callback()], data={"layers": "1"})
    assert "gates layers 0, but these gates are for layers 1" in error_line(
        refused(capsys, "fit", "-c", write_config(tmp_path / "c.yaml", config))
    )
