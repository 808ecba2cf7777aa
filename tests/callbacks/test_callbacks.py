"""What a fit leaves: the exported gates, TensorBoard's pictures, the table; and the harvest's progress bar."""

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from smartkv import GateBank, load_backbone
from smartkv.metrics.nulls import score_nulls
from tests.lightning_fixtures import (
    WATCHER,
    Watcher,
    fit,
    gates_config,
    harvest,
    labelled,
    lifespan_of,
    made_keys,
    run_cli,
    write_config,
    write_made_shards,
)

HEADS = ["L00H0", "L00H1", "L01H0", "L01H1"]
EPOCHS = 2


@dataclass
class Run:
    """A finished fit: its folder, the one that looked on, what it printed, and what TensorBoard reads of it."""

    root: Path
    watcher: Watcher
    printed: str
    events: EventAccumulator

    def scalars(self, tag: str) -> list[float]:
        return [event.value for event in self.events.Scalars(tag)]

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the exported gates."""
        return json.loads((self.root / "export" / "config.json").read_text())


def callbacks(root: Path, per_head: bool = False) -> list[dict[str, Any]]:
    """As the configs in configs/gates have them."""
    keep = {"dirpath": str(root / "checkpoints"), "monitor": "val_r2_mean", "mode": "max", "save_last": True,
            "enable_version_counter": False}  # fmt: skip
    return [
        {"class_path": "ModelCheckpoint", "init_args": keep},
        {"class_path": "GateExport", "init_args": {"out": str(root / "export"), "per_head": per_head}},
    ]


def tensorboard(root: Path) -> dict[str, Any]:
    options = {"save_dir": str(root), "name": "board", "version": "", "default_hp_metric": False}
    return {"class_path": "TensorBoardLogger", "init_args": options}


def run(shards: Path, root: Path, chosen: list[dict[str, Any]]) -> Run:
    trainer = {"logger": tensorboard(root), "max_epochs": EPOCHS}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        watcher = fit(shards, root, callbacks=chosen, trainer=trainer)
    events = EventAccumulator(str(root / "board"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return Run(root, watcher, printed.getvalue(), events.Reload())


@pytest.fixture(scope="module")
def tiny(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs on the harvest of the tiny model."""
    root = tmp_path_factory.mktemp("tiny")
    dashboard = {"class_path": "HeadDashboard", "init_args": {"sample_windows": 2}}
    return run(tiny_shards, root, [*callbacks(root, per_head=True), dashboard])


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


# -- export -----------------------------------------------------------------------------------------------------------


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
    assert 'GateBank.from_pretrained("someone/gates"' in (misled.root / "named" / "README.md").read_text()


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
    last = misled.root / "checkpoints" / "last.ckpt"
    run_cli("fit", "-c", write_config(tmp_path / "resumed.yaml", config), "--ckpt_path", last)
    assert Watcher.last.steps[-1] > misled.watcher.steps[-1], "nothing was trained"
    assert {path.name: path.read_bytes() for path in (root / "export").iterdir()} == before


# -- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["val_r2_mean", "val_r2_median", "val_r2_p10", "val_r2_min", "val_loss"])
def test_the_summary_has_a_point_an_epoch(tiny: Run, tag: str) -> None:
    assert len(tiny.scalars(tag)) == EPOCHS


@pytest.mark.parametrize("figure", ["val_r2_head", "train_loss_head", "val_loss_head"])
def test_every_head_has_its_curve(tiny: Run, figure: str) -> None:
    tags = [tag for tag in tiny.events.Tags()["scalars"] if tag.startswith(f"{figure}/")]
    assert sorted(tags) == [f"{figure}/{head}" for head in HEADS]
    assert all(len(tiny.scalars(tag)) == EPOCHS for tag in tags)


def test_the_summary_is_that_of_the_heads(tiny: Run) -> None:
    heads = torch.tensor([tiny.scalars(f"val_r2_head/{head}") for head in HEADS])
    torch.testing.assert_close(torch.tensor(tiny.scalars("val_r2_mean")), heads.mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("null", ["constant", "position", "token_table", "random"])
def test_the_nulls_stand_beside_the_gates(tiny: Run, null: str) -> None:
    expected = float(score_nulls(tiny.watcher.datamodule.rows)[null].r2().nanmean())
    assert tiny.scalars(f"val_r2_null/{null}") == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("tag", ["heads/r2", "heads/predicted_against_true"])
def test_there_is_a_picture_an_epoch(tiny: Run, tag: str) -> None:
    pictures = tiny.events.Images(tag)
    assert len(pictures) == EPOCHS
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)


def layout(done: Run) -> Layout:
    tensor = done.events.Tensors("custom_scalars__config__")[0].tensor_proto
    return Layout.FromString(tensor.string_val[0])


def test_the_custom_layout_has_a_card_a_question(tiny: Run) -> None:
    cards = {category.title: len(category.chart) for category in layout(tiny).category}
    assert cards == {"How well do the gates predict?": 1, "Does the training go well?": 2}


def test_every_curve_of_the_custom_layout_is_logged_once(tiny: Run) -> None:
    logged = tiny.events.Tags()["scalars"]
    for tag in (tag for category in layout(tiny).category for chart in category.chart for tag in chart.multiline.tag):
        assert [name for name in logged if re.match(tag, name)] == [tag.removesuffix("$")]


def test_the_learning_rate_is_logged(tiny: Run) -> None:
    assert tiny.scalars("lr") and all(rate > 0 for rate in tiny.scalars("lr"))


def hparams(done: Run) -> Iterator[dict[str, Any]]:
    """Settings of each session that the hparams tab shows."""
    for content in done.events.PluginTagToContent("hparams").values():
        data = HParamsPluginData.FromString(content)
        if data.HasField("session_start_info"):
            yield dict(data.session_start_info.hparams.items())


def test_the_hparams_tab_has_the_settings(tiny: Run) -> None:
    settings = {name: value for session in hparams(tiny) for name, value in session.items()}
    assert settings["hidden"].number_value == 8
    assert settings["objective/init_args/loss"].string_value == "huber"
    assert settings["threshold"].number_value == pytest.approx(0.05)


@pytest.mark.parametrize("tag", ["val_r2_mean", "val_r2_median", "val_r2_p10", "val_r2_min"])
def test_the_hparams_tab_has_the_final_figures(tiny: Run, tag: str) -> None:
    assert tiny.scalars(f"hp/{tag}")[-1] == pytest.approx(tiny.scalars(tag)[-1], abs=1e-6)


# -- the table and the progress bar -----------------------------------------------------------------------------------


def table_rows(printed: str) -> dict[str, list[float]]:
    """Figures of each row of the table, by its first cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    return {name: [float(cell) for cell in cells] for name, *cells in rows}


def test_the_table_shows_each_layer_beside_the_nulls_and_its_losses(tiny: Run) -> None:
    rows, r2 = table_rows(tiny.printed), tiny.watcher.module.val_r2_head
    nulls = [sums.r2() for sums in score_nulls(tiny.watcher.datamodule.rows).values()]
    losses = [torch.tensor([tiny.scalars(f"train_loss_head/{head}")[epoch] for head in HEADS]) for epoch in (0, -1)]
    for layer in range(2):
        here = slice(2 * layer, 2 * layer + 2)
        expected = [float(values[here].mean()) for values in (r2, *nulls, *losses)]
        assert rows[str(layer)] == pytest.approx(expected, abs=6e-4)


def test_every_head_is_written_beside_the_nulls_and_its_losses(tiny: Run) -> None:
    with (tiny.root / "heads.csv").open() as file:
        rows = {row.pop("head"): row for row in csv.DictReader(file)}
    nulls = {f"R² {name}": sums.r2() for name, sums in score_nulls(tiny.watcher.datamodule.rows).items()}
    assert list(rows) == HEADS
    for place, head in enumerate(HEADS):
        expected = {"R²": tiny.watcher.module.val_r2_head[place], **{name: r2[place] for name, r2 in nulls.items()}}
        expected |= {f"loss, epoch {e}": tiny.scalars(f"train_loss_head/{head}")[e] for e in range(EPOCHS)}
        found = {name: float(value) for name, value in rows[head].items()}
        assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


def test_the_table_ends_with_the_mean_over_all_heads(tiny: Run) -> None:
    assert table_rows(tiny.printed)["mean"][0] == pytest.approx(tiny.scalars("val_r2_mean")[-1], abs=6e-4)


def test_the_dashboard_does_without_tensorboard(tiny_shards: Path, tmp_path: Path) -> None:
    dashboard = {"class_path": "HeadDashboard"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit(tiny_shards, tmp_path, callbacks=[dashboard], trainer={"logger": False, "max_epochs": 1})
    assert "Gates by layer" in printed.getvalue()


def test_the_harvest_s_progress_bar_counts_tokens(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = [{"class_path": "ShardWriter"}, {"class_path": "HarvestProgress"}]
    trainer = {"callbacks": bar, "enable_progress_bar": True}
    counts = {"train": 2, "validation": 1}
    harvest(tmp_path / "shards", tiny_backbone, tiny_texts, windows=counts, trainer=trainer)
    captured = capsys.readouterr()
    shown = (captured.out + captured.err).replace("\n", "\r").split("\r")
    finished = [line for line in shown if "Harvest" in line and "100%" in line]
    assert finished and "192/192" in finished[-1] and "tokens/s" in finished[-1]


def test_a_manifest_is_announced_with_its_size(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = harvest(tmp_path / "shards", tiny_backbone, tiny_texts, windows={"train": 2, "validation": 1})
    assert f"2 shards with 192 tokens of 4 heads in {out}" in capsys.readouterr().out
