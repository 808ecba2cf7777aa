"""The run's TensorBoard logger, and the cards of its custom scalars."""

import re
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from callbacks.tensorboard_logging import custom_scalars_layout, tensorboard_logger, tensorboard_writer

EVICTION = "What does eviction cost?"


def tags(eviction: bool) -> list[str]:
    layout = custom_scalars_layout(eviction)
    return [tag for cards in layout.values() for _, tags in cards.values() for tag in tags]


def test_a_run_without_tensorboard_has_no_writer(tmp_path: Path) -> None:
    trainer = L.Trainer(logger=CSVLogger(tmp_path), accelerator="cpu")
    assert tensorboard_logger(trainer) is None and tensorboard_writer(trainer) is None


def test_the_tensorboard_logger_is_found_beside_others(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    assert tensorboard_logger(L.Trainer(logger=[CSVLogger(tmp_path), board], accelerator="cpu")) is board


def test_the_cost_of_eviction_has_a_card_only_where_it_is_measured() -> None:
    assert EVICTION in custom_scalars_layout(True) and EVICTION not in custom_scalars_layout(False)


def test_no_card_shows_single_heads() -> None:
    heads = ("val_r2_head/L00H0", "train_loss_head/L00H0", "val_loss_head/L00H0")
    assert not any(re.match(tag, head) for tag in tags(True) for head in heads)


def test_gates_and_window_share_the_card_of_what_eviction_costs() -> None:
    _, shown = next(iter(custom_scalars_layout(True)[EVICTION].values()))
    measured = ("val_delta_nll/window_0.22", "val_delta_nll/all-gated_0.22", "val_footprint/window_0.22")
    assert [any(re.match(tag, name) for tag in shown) for name in measured] == [True, True, False]


def test_tensorboard_reads_the_layout_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logger.experiment.add_custom_scalars(custom_scalars_layout(True))
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(custom_scalars_layout(True))
    assert sum(len(category.chart) for category in layout.category) == 4
