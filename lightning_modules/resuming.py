"""Base module of runs that can be killed and resumed any number of times."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.evaluation_loop import RestartStage


class Resuming(L.LightningModule):
    """LightningModule that resumes exactly where its checkpoint was saved, which Lightning 2.6 does not always do.

    A checkpoint at the end of a batch is saved before the validation that is due at that step, and before the end of
    the epoch if the batch is its last. Lightning counts both as done when it resumes. This module makes the resumed run
    begin with them, in Lightning's own loops, so that every callback sees the same events as in an uninterrupted run.
    It also restores the logged figures that callbacks monitor, and keeps a run that stopped early stopped.

    Attributes:
        ends_a_batch: the checkpoint was saved at the end of a batch, and what follows that batch is still to be run.
        figures: values of `callback_metrics` when the checkpoint was saved.
    """

    hparams: Any  # attributes by the names of __init__'s arguments
    trainer: Any  # with its `datamodule`, which Lightning's Trainer does not declare

    def __init__(self) -> None:
        super().__init__()
        self.ends_a_batch = False
        self.figures: dict[str, float] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the monitored figures, and whether a validation is due."""
        fit = self.trainer.fit_loop
        count = fit.epoch_loop.batch_progress.current
        at_end = count.completed < count.processed  # true while `on_train_batch_end` hooks run
        checkpoint["owes_validation"] = at_end and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        checkpoint["figures"] = {name: float(figure) for name, figure in self.trainer.callback_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the figures, and what follows the checkpoint's batch."""
        self.figures = checkpoint.get("figures", {})  # absent in checkpoints of older versions
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counts = batches["current"], batches["total"]
        last = batches["is_last_batch"] and counts[0]["completed"] < counts[0]["processed"]
        self.ends_a_batch = last or checkpoint.get("owes_validation", False)
        if self.ends_a_batch:
            for count in counts:  # otherwise Lightning counts the epoch as done too
                count["completed"] = count["processed"]

    def on_fit_start(self) -> None:
        """Let a run whose steps are all done begin, if a validation is still due."""
        loop = self.trainer.fit_loop.epoch_loop
        if self.ends_a_batch and loop.max_steps >= 0:
            loop.max_steps += 1  # until the validation begins

    def on_train_start(self) -> None:
        """Restore figures and stops, and continue after the checkpoint's batch."""
        trainer, fit = self.trainer, self.trainer.fit_loop
        figures = {name: torch.tensor(figure, device=self.device) for name, figure in self.figures.items()}
        trainer.callback_metrics.update(figures)
        if any(stop.stopping_reason != EarlyStoppingReason.NOT_STOPPED for stop in trainer.early_stopping_callbacks):
            trainer.should_stop = True
        if fit.restarted_on_epoch_end:  # a run by steps; otherwise Lightning ends the same epoch again
            fit.epoch_progress.increment_completed()
            fit.reset_restart_stage()
            fit.epoch_loop.restarting = False
        if self.ends_a_batch:
            self._continue_after_the_batch()

    def _continue_after_the_batch(self) -> None:
        fit = self.trainer.fit_loop
        loop, batches = fit.epoch_loop, fit._data_fetcher
        if loop._should_check_val_fx(batches):
            loop.val_loop.restarting = False  # begin at its first batch
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # otherwise Lightning skips it
        else:
            loop._batches_that_stepped += 1
            batches.done = loop._num_ready_batches_reached()  # otherwise the epoch begins again
            self._resumed()

    def on_validation_start(self) -> None:
        """End the resume: the validation that was due begins."""
        if self.ends_a_batch:
            self._resumed()

    def _resumed(self) -> None:
        self.ends_a_batch = False
        if self.trainer.max_steps >= 0:
            self.trainer.fit_loop.epoch_loop.max_steps -= 1
