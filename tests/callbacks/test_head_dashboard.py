"""What a fit shows of its heads: TensorBoard's curves and pictures, the table, and heads.csv."""

import contextlib
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from smartkv.metrics.nulls import score_nulls
from tests.callbacks.fixtures import EPOCHS, HEADS, Run
from tests.lightning_fixtures import fit

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
    rates = tiny.scalars("lr")
    assert rates[0] == pytest.approx(tiny.watcher.module.hparams["learning_rate"])
    assert rates[-1] < rates[0] and min(rates) >= 0  # the schedule ends at 0


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
        expected |= {f"loss, epoch {e + 1}": tiny.scalars(f"train_loss_head/{head}")[e] for e in range(EPOCHS)}
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
