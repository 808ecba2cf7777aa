"""What lets a run be killed and gone on with any number of times."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.evaluation_loop import RestartStage


class Resuming(L.LightningModule):
    """Lets a run go on just where its checkpoint was saved, which Lightning (2.6) does not always do.

    A checkpoint of a batch's end is saved before the validation that is due at its step and, if the batch is the last,
    before its epoch ends. Lightning takes both for done. Here the run that goes on begins with them, in Lightning's own
    loops, so that every callback sees what it would have seen. It also gets back the figures that callbacks monitor,
    and a run that stopped early stays stopped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends_a_batch = False  # the checkpoint was saved at a batch's end; what follows that batch has yet to come
        self.figures: dict[str, float] = {}  # that callbacks monitor, when the checkpoint was saved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fit = self.trainer.fit_loop
        count = fit.epoch_loop.batch_progress.current
        at_end = count.completed < count.processed  # so it is while callbacks are told that the batch ends
        checkpoint["owes_validation"] = at_end and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        checkpoint["figures"] = {name: float(figure) for name, figure in self.trainer.callback_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.figures = checkpoint.get("figures", {})  # checkpoints of older runs have none
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counts = batches["current"], batches["total"]
        last = batches["is_last_batch"] and counts[0]["completed"] < counts[0]["processed"]
        self.ends_a_batch = last or checkpoint.get("owes_validation", False)
        if self.ends_a_batch:
            for count in counts:  # the batch is done; Lightning would count its epoch as done too
                count["completed"] = count["processed"]

    def on_fit_start(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop
        if self.ends_a_batch and loop.max_steps >= 0:
            loop.max_steps += 1  # until the validation begins: a run whose steps are all done would not begin at all

    def on_train_start(self) -> None:
        trainer, fit = self.trainer, self.trainer.fit_loop
        figures = {name: torch.tensor(figure, device=self.device) for name, figure in self.figures.items()}
        trainer.callback_metrics.update(figures)
        if any(stop.stopping_reason != EarlyStoppingReason.NOT_STOPPED for stop in trainer.early_stopping_callbacks):
            trainer.should_stop = True
        if fit.restarted_on_epoch_end:  # a run by steps: Lightning would end the same epoch again
            fit.epoch_progress.increment_completed()
            fit.reset_restart_stage()
            fit.epoch_loop.restarting = False
        if self.ends_a_batch:
            self._go_on_after_the_batch()

    def _go_on_after_the_batch(self) -> None:
        fit = self.trainer.fit_loop
        loop, batches = fit.epoch_loop, fit._data_fetcher
        if loop._should_check_val_fx(batches):
            loop.val_loop.restarting = False  # from its first batch
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # or Lightning passes over it
        else:
            loop._batches_that_stepped += 1
            batches.done = loop._num_ready_batches_reached()  # or the epoch would begin again
            self._went_on()

    def on_validation_start(self) -> None:
        if self.ends_a_batch:
            self._went_on()

    def _went_on(self) -> None:
        self.ends_a_batch = False
        if self.trainer.max_steps >= 0:
            self.trainer.fit_loop.epoch_loop.max_steps -= 1
