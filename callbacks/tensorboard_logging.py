"""TensorBoard's logger of a run, and the layout of its custom scalars."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

SUMMARY_TAGS = ["val_r2_mean", "val_r2_median", "val_r2_p10", "val_r2_min"]
LEARNING_RATE_TAG = "lr"


def tensorboard_logger(trainer: L.Trainer) -> TensorBoardLogger | None:
    """Return the run's TensorBoard logger; None where it has none."""
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def tensorboard_writer(trainer: L.Trainer) -> Any:
    """Return TensorBoard's own writer, which takes figures and layouts; None where the run has no such logger."""
    logger = tensorboard_logger(trainer)
    return None if logger is None else logger.experiment


def logged_step(trainer: L.Trainer) -> int:
    """Return the step at which Lightning logs what follows the latest optimiser step: it counts from 0."""
    return max(0, trainer.global_step - 1)


def custom_scalars_layout(eviction: bool) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's custom scalars: one card a question.

    The figures of single heads have no card. The picture `heads/r2` shows them as a heatmap by layer.

    Args:
        eviction: the run measures what eviction by its gates costs, so that there is a card for it.
    """
    # a tag is a regular expression that is matched from its start: the $ leaves out the figures of single heads
    layout: dict[str, dict[str, list[Any]]] = {
        "How well do the gates predict?": {
            "R² of log4 lifespan: mean, median, 10th percentile and minimum over heads": [
                "Multiline",
                [f"{tag}$" for tag in SUMMARY_TAGS],
            ]
        },
        "Does the training go well?": {
            "Loss, training and validation": ["Multiline", ["train_loss$", "val_loss$"]],
            "Learning rate": ["Multiline", [f"{LEARNING_RATE_TAG}$"]],
        },
    }
    if eviction:
        layout["What does eviction cost?"] = {
            "ΔNLL of the gates beside the window, nats a token": ["Multiline", ["val_delta_nll/"]]
        }
    return layout
