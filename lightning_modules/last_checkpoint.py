"""The checkpoint that `--ckpt_path last` resumes."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


class LastCheckpoint(Checkpoint):
    """Callback that keeps `last.ckpt` of each ModelCheckpoint with `save_last` up to date.

    Lightning 2.6 writes it only where it writes another checkpoint too. With a monitored figure that is the best one so
    far, and `--ckpt_path last` would go back to it. This callback writes it after every validation or epoch, whenever
    the ModelCheckpoint looks at its figure, and at the end of the run. The Trainer runs checkpoint callbacks after all
    others and these in their order, so it sees what the ModelCheckpoints have written.
    """

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write the last checkpoints of those that save after a validation."""
        self._save(trainer, at_epoch_end=False)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write the last checkpoints of those that save at the end of an epoch."""
        self._save(trainer, at_epoch_end=True)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write all last checkpoints that are of an earlier step."""
        for at_epoch_end in (False, True):
            self._save(trainer, at_epoch_end)

    def _save(self, trainer: L.Trainer, at_epoch_end: bool) -> None:
        for saving in trainer.checkpoint_callbacks:
            if (
                isinstance(saving, ModelCheckpoint)
                and saving.save_last is True  # not "link", which is to be one of the others
                and saving._should_save_on_train_epoch_end(trainer) == at_epoch_end
                and not saving._should_skip_saving_checkpoint(trainer)
            ):
                saving._save_last_checkpoint(trainer, saving._monitor_candidates(trainer))
