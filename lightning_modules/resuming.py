"""Base module of runs that can be killed and resumed any number of times."""

import json
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.evaluation_loop import RestartStage

from lightning_modules.last_checkpoint import LastCheckpoint
from lightning_modules.resumed_curves import ResumedCurves
from lightning_modules.trainer_settings import SINGLE, check_batches, check_precision
from smartkv.errors import SmartKVError
from smartkv.io.checks import differences
from smartkv.io.class_names import bare_class_paths


class Resuming(L.LightningModule):
    """LightningModule that resumes exactly where its checkpoint was saved, which Lightning 2.6 does not always do.

    A checkpoint at the end of a batch is saved before the validation that is due at that step, and before the end of
    the epoch if the batch is its last. Lightning counts both as done when it resumes. This module makes the resumed run
    begin with them, in Lightning's own loops, so that every callback sees the same events as in an uninterrupted run.
    It also restores the logged figures that callbacks monitor, keeps a run that stopped early stopped, and deletes what
    was logged after the checkpoint.

    A resumed run has the settings of its checkpoint: weights, optimiser and schedule come from there, so another value
    would be ignored or mixed in. Other settings are refused. The Trainer's settings, such as its number of epochs, may
    change, but for its precision.

    Attributes:
        FREE: settings that may change, because they decide no result.
        FIT_ONLY: settings that a validation of the checkpoint does not use.
        PRECISIONS: the Trainer's precisions in which the module is trained well.
        ends_a_batch: the checkpoint was saved at the end of a batch, and what follows that batch is still to be run.
        figures: values of `callback_metrics` when the checkpoint was saved.
    """

    FREE: ClassVar[frozenset[str]] = frozenset({"threads", "trust_remote_code"})
    FIT_ONLY: ClassVar[frozenset[str]] = frozenset()

    PRECISIONS: ClassVar[tuple[str, ...]] = (SINGLE,)

    hparams: Any  # attributes by the names of __init__'s arguments
    trainer: Any  # with its `datamodule`, which Lightning's Trainer does not declare

    def __init__(self) -> None:
        super().__init__()
        self.ends_a_batch = False
        self.figures: dict[str, float] = {}

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks that write `last.ckpt` and delete what was logged after it; this is a fit's first hook.

        Raises:
            SmartKVError: the Trainer has settings that the module cannot work with.
        """
        advice = "trained weights are float32; the language model's dtype is model.dtype, where there is one"
        check_precision(self.trainer, self.PRECISIONS, advice)
        if self.trainer.state.fn != "fit":
            return []
        check_batches(self.trainer)
        curves = [ResumedCurves(self.trainer.loggers)] if self.trainer.is_global_zero else []
        return [*curves, LastCheckpoint()]

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON values by their names in a config."""
        hparams = {k: v for k, v in self.hparams.items() if not k.startswith("_") and k not in self.FREE}
        return bare_class_paths(json.loads(json.dumps(hparams)))

    def _kind(self) -> dict[str, str]:
        """Return what else a resumed run must share with its checkpoint."""
        data, precision = type(self.trainer.datamodule).__name__, self.trainer.precision
        return {"model": type(self).__name__, "data": data, "precision": precision}

    def settings_of(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what `settings` was for a checkpoint, also for one of SmartKV 0.1.0."""
        if "settings" in checkpoint:
            return checkpoint["settings"]
        then = bare_class_paths(checkpoint.get("hyper_parameters", {}))
        return {name: value for name, value in then.items() if (name, value) != ("dtype", "auto")}  # any may be meant

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings, the monitored figures, and whether a validation is due."""
        checkpoint["settings"] = self._kind() | self.settings()
        fit = self.trainer.fit_loop
        count = fit.epoch_loop.batch_progress.current
        at_end = count.completed < count.processed  # true while `on_train_batch_end` hooks run
        checkpoint["owes_validation"] = at_end and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        checkpoint["figures"] = {name: float(figure) for name, figure in self.trainer.callback_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the figures, and what follows the checkpoint's batch.

        Raises:
            SmartKVError: the checkpoint is of another kind of run, or of other settings, data or weights.
        """
        self._check(checkpoint)
        self.figures = checkpoint.get("figures", {})  # absent in checkpoints of older versions
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counts = batches["current"], batches["total"]
        last = batches["is_last_batch"] and counts[0]["completed"] < counts[0]["processed"]
        self.ends_a_batch = last or checkpoint.get("owes_validation", False)
        if self.ends_a_batch:
            for count in counts:  # otherwise Lightning counts the epoch as done too
                count["completed"] = count["processed"]

    def _check(self, checkpoint: dict[str, Any]) -> None:
        then, now, data = self.settings_of(checkpoint), self._kind() | self.settings(), self.trainer.datamodule
        if "_class_path" in then:  # of the command line's, in checkpoints of 0.1.0
            then = then | {"model": then["_class_path"].rpartition(".")[2]}
        if not then:
            raise SmartKVError(f"the checkpoint is not of a {now['model']}: it has no settings")
        fitting = self.trainer.state.fn == "fit"
        if changed := differences(
            then, {k: v for k, v in now.items() if fitting or k not in {"precision", *self.FIT_ONLY}}
        ):
            raise SmartKVError(
                f"the checkpoint is of another run: {'; '.join(changed)}. Give the checkpoint's settings to go on from "
                "it, or start a run of its own, in its own folders and without --ckpt_path"
            )
        if fitting and "optimizer_states" not in checkpoint:
            raise SmartKVError("the checkpoint holds weights alone (save_weights_only): a fit cannot go on from it")
        if state := checkpoint.get(type(data).__qualname__):
            data.load_state_dict(state)  # Lightning compares the data only after it has loaded the weights
        own = self.state_dict()
        for name, tensor in checkpoint["state_dict"].items():
            if name in own and tensor.shape != own[name].shape:
                raise SmartKVError(
                    f"the checkpoint is of another model or other layers: {name} has shape {list(tensor.shape)}, "
                    f"now {list(own[name].shape)}"
                )

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
