"""The exported gates: the best of the run, and what their files say."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smartkv import GateBank, HybridPolicy, load_backbone, policy_of
from smartkv.gates.model_card import usable_footprint
from smartkv.policies.budgets import Calibration
from tests.callbacks.fixtures import EPOCHS, Run, callbacks, run, tensorboard
from tests.lightning_fixtures import (
    WATCHER,
    Watcher,
    error_line,
    fit,
    gates_config,
    harvest,
    labelled,
    lifespan_of,
    made_keys,
    refused,
    run_cli,
    write_config,
    write_made_shards,
)


@pytest.fixture(scope="module")
def misled_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation labels that are the opposite of the training labels: each epoch of training makes R² worse."""
    keys = {"train": made_keys(4, 128, seed=0), "validation": made_keys(2, 128, seed=1)}
    lifespans = {
        "train": [lifespan_of(window) for window in keys["train"]],
        "validation": [lifespan_of(window, sign=-1) for window in keys["validation"]],
    }
    return write_made_shards(tmp_path_factory.mktemp("misled"), lifespans, keys)


@pytest.fixture(scope="module")
def misled(misled_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("misled-fit")
    named = {"out": str(root / "named"), "name": "someone/gates", "dtype": "float16"}
    return run(misled_shards, root, [*callbacks(root), {"class_path": "GateExport", "init_args": named}])


def test_exported_gates_predict_on_raw_keys_what_the_module_does(tiny: Run, tiny_shards: Path) -> None:
    model = load_backbone(tiny.config["details"]["training"]["backbone"], "float32").model
    bank = GateBank.from_pretrained(tiny.root / "export", model=model)
    scores = tiny.scalars("val_r2_mean")
    best = scores.index(max(scores))
    keys = labelled(tiny_shards, "validation")["keys"]
    with torch.no_grad():
        torch.testing.assert_close(bank(keys.float()).squeeze(-1), tiny.watcher.predictions[best], rtol=1e-4, atol=1e-4)


def test_exported_gates_predict_layer_by_layer_what_the_module_does(tiny: Run, tiny_shards: Path) -> None:
    bank = GateBank.from_pretrained(tiny.root / "export")
    scores = tiny.scalars("val_r2_mean")
    truth = tiny.watcher.predictions[scores.index(max(scores))]
    keys = labelled(tiny_shards, "validation")["keys"]
    with torch.no_grad():
        for layer in range(2):
            here = slice(2 * layer, 2 * layer + 2)
            predicted = bank.predict(layer, keys[here][None])[0, :, :, 0]
            torch.testing.assert_close(predicted, truth[here], rtol=1e-4, atol=1e-4)


def test_gates_are_exported_in_half_precision_and_under_a_name_if_wanted(misled: Run) -> None:
    half, whole = (misled.root / name / "model.safetensors" for name in ("named", "export"))
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in (half, whole)]
    assert sizes[0] * 2 == sizes[1]
    assert 'gates="someone/gates"' in (misled.root / "named" / "README.md").read_text()


def test_r2_gets_worse_by_construction_of_this_run(misled: Run) -> None:
    scores = misled.scalars("val_r2_mean")
    assert len(scores) == EPOCHS and scores.index(max(scores)) == 0 and scores[-1] < scores[0] - 0.01


def test_the_best_epoch_is_exported_not_the_last(misled: Run, misled_shards: Path) -> None:
    bank = GateBank.from_pretrained(misled.root / "export")
    with torch.no_grad():
        predicted = bank(labelled(misled_shards, "validation")["keys"].float()).squeeze(-1)
    torch.testing.assert_close(predicted, misled.watcher.predictions[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(predicted, misled.watcher.predictions[-1], atol=1e-2)


@pytest.mark.parametrize("name", ["tiny", "misled"])
def test_the_exported_config_has_the_figures_of_the_best_epoch(name: str, request: pytest.FixtureRequest) -> None:
    done: Run = request.getfixturevalue(name)
    best = max(done.scalars("val_r2_mean"))
    assert done.config["details"]["metrics"]["val_r2_mean"] == pytest.approx(best, abs=1e-5)


def test_the_exported_config_names_the_step_of_the_best_epoch(misled: Run) -> None:
    training = misled.config["details"]["training"]
    assert (training["epoch"], training["step"]) == (0, misled.watcher.steps[0])


def test_the_exported_config_says_what_the_gates_were_trained_on(tiny: Run, tiny_backbone: Path) -> None:
    details = tiny.config["details"]
    expected = {"target": "log4 lifespan", "threshold": 0.05, "follow_up": 32, "sinks": 4, "inputs": "keys"}
    assert {name: details[name] for name in expected} == expected
    assert details["layers"] == "0-1"
    assert details["training"]["backbone"] == str(tiny_backbone)
    assert details["training"]["windows"] == {"train": 7, "validation": 3}
    assert details["training"]["settings"]["hidden"] == 8


def test_the_exported_config_has_the_model_s_fingerprint(tiny: Run, tiny_backbone: Path) -> None:
    assert tiny.config["fingerprint"] == vars(load_backbone(str(tiny_backbone), "float32").fingerprint)


def test_the_export_has_a_model_card_and_nothing_pickled(tiny: Run) -> None:
    files = {path.name for path in (tiny.root / "export").iterdir() if path.is_file()}
    assert files == {"model.safetensors", "config.json", "README.md"}


def test_a_policy_with_prices_goes_with_the_gates(tiny: Run) -> None:
    gates = GateBank.from_pretrained(tiny.root / "export")
    prices = dict(gates.details["prices"])
    assert len(prices) > 1 and sorted(prices.values(), reverse=True) == [prices[f] for f in sorted(prices)]
    assert policy_of(gates, min(prices)).price == pytest.approx(prices[min(prices)])
    assert [footprint for footprint, _ in gates.details["layer_shares"]] == [f for f, _ in gates.details["prices"]]
    assert all(len(shares) == 2 for _, shares in gates.details["layer_shares"])


def test_the_price_of_a_footprint_keeps_it_on_the_training_windows(tiny: Run, tiny_shards: Path) -> None:
    gates = GateBank.from_pretrained(tiny.root / "export")
    shard = load_file(tiny_shards / "train-00000.safetensors")["keys"]
    windows = [[layer[None, :, start : start + 64] for layer in shard] for start in (0, 64)]
    second = load_file(tiny_shards / "train-00001.safetensors")["keys"]
    windows += [[layer[None, :, start : start + 64] for layer in second] for start in (0, 64)]
    calibration = Calibration.of(gates, windows, 16)
    for footprint, price in gates.details["prices"]:
        kept = calibration.footprint(replace(HybridPolicy.from_dict(gates.details["policy"]), price=price))
        assert footprint - 0.02 < kept <= footprint + 1e-6


def test_the_card_s_code_runs(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    card = (tiny.root / "export" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_gates_that_no_cache_can_use_get_no_prices(tiny_texts: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    shards = harvest(tmp_path / "shards", tiny_backbone, tiny_texts, model={"post_rope": True})
    export = {"class_path": "GateExport", "init_args": {"out": str(tmp_path / "export")}}
    fit(shards, tmp_path / "run", callbacks=[export], data={"inputs": "keys_post_rope"}, trainer={"max_epochs": 1})
    assert not {"policy", "prices"} & set(GateBank.from_pretrained(tmp_path / "export").details)


def test_layers_without_gates_keep_all_in_the_policy(tmp_path: Path) -> None:
    keys = {split: made_keys(2, 128, seed=seed, layers=3) for seed, split in enumerate(("train", "validation"))}
    lifespans = {split: [lifespan_of(window) for window in windows] for split, windows in keys.items()}
    shards = write_made_shards(tmp_path / "shards", lifespans, keys)
    export = {"class_path": "GateExport", "init_args": {"out": str(tmp_path / "export")}}
    fit(shards, tmp_path / "run", callbacks=[export], data={"layers": "1-2"}, trainer={"max_epochs": 1})
    gates = GateBank.from_pretrained(tmp_path / "export")
    policy = policy_of(gates, usable_footprint(gates.details["prices"]))
    assert [rule.rule for rule in policy.by_layer(3)] == ["full", "gated", "gated"]


def test_one_file_a_head_is_exported_on_request(tiny: Run) -> None:
    files = {path.name for path in (tiny.root / "export" / "heads").iterdir()}
    assert files == {f"l{layer}_h{head}.safetensors" for layer in range(2) for head in range(2)}


def test_a_head_s_file_is_a_plain_mlp_on_raw_keys(tiny: Run, tiny_shards: Path) -> None:
    bank = GateBank.from_pretrained(tiny.root / "export")
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    state = load_file(tiny.root / "export" / "heads" / "l1_h0.safetensors")
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    keys = labelled(tiny_shards, "validation")["keys"].float()
    with torch.no_grad():
        torch.testing.assert_close(net(keys[2]), bank(keys)[2], rtol=1e-4, atol=1e-5)


def test_no_file_a_head_is_exported_unasked(misled: Run) -> None:
    assert not (misled.root / "export" / "heads").exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_a_resumed_fit_that_gets_no_better_leaves_the_export_alone(
    misled: Run, misled_shards: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(misled.root, tmp_path / "root"))
    before = {path.name: path.read_bytes() for path in (root / "export").iterdir()}
    trainer = {"logger": tensorboard(root), "max_epochs": EPOCHS + 1}
    config = gates_config(misled_shards, root, callbacks=[*callbacks(root), WATCHER], trainer=trainer)
    last = root / "checkpoints" / "last.ckpt"
    run_cli("fit", "-c", write_config(tmp_path / "resumed.yaml", config), "--ckpt_path", last)
    assert Watcher.last.steps[-1] > misled.watcher.steps[-1], "nothing was trained"
    assert {path.name: path.read_bytes() for path in (root / "export").iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mode": "min"}, "GateExport.mode max, now min. Give the checkpoint's settings"),
        ({"monitor": "val_loss"}, "'monitor': 'val_r2_mean', 'name': None}, now GateExport{'monitor': 'val_loss'"),
        ({"name": "someone/gates"}, "'name': None}, now GateExport{'monitor': 'val_r2_mean', 'name': 'someone/gates'}"),
    ],
    ids=["mode", "monitor", "name"],
)
def test_a_resumed_run_goes_on_comparing_the_same_figure(
    changed: dict[str, str],
    said: str,
    tiny: Run,
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saving, export = callbacks(tmp_path)
    export["init_args"] |= changed
    config = gates_config(tiny_shards, tmp_path, trainer={"max_epochs": EPOCHS + 1}, callbacks=[saving, export])
    options = (
        "-c",
        write_config(tmp_path / "fit.yaml", config),
        "--ckpt_path",
        tiny.root / "checkpoints" / "last.ckpt",
    )
    assert said in error_line(refused(capsys, "fit", *options))
    assert not (tmp_path / "export").exists()


def test_a_resumed_run_may_export_more_than_before(tiny: Run, tiny_shards: Path, tmp_path: Path) -> None:
    more = {
        "class_path": "GateExport",
        "init_args": {"out": str(tmp_path / "more"), "monitor": "val_loss", "mode": "min"},
    }
    settings = {"trainer": {"max_epochs": EPOCHS + 1}, "callbacks": [*callbacks(tmp_path), more]}
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path, **settings))
    run_cli("fit", "-c", config, "--ckpt_path", tiny.root / "checkpoints" / "last.ckpt")
    assert (tmp_path / "more" / "model.safetensors").is_file()
