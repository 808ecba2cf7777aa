"""What lets a run be killed and gone on with any number of times."""

from typing import Any

import lightning as L


class Resuming(L.LightningModule):
    """Keeps Lightning's count of epochs right. A run that goes on from a checkpoint of an epoch's last batch does not
    count the next epoch as begun (`FitLoop.on_advance_start`, Lightning 2.6); a checkpoint of its middle would be taken
    for one of a finished epoch, and the run that goes on from it would do that epoch's first batches twice.
    """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        progress = self.trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()
