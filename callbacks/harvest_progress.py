"""Progress bar of the harvest."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from datamodules.documents import DocumentWindows


class HarvestProgress(TQDMProgressBar):
    """Progress bar that counts tokens instead of batches: done, per second and time left, of this process's shards."""

    def init_predict_tqdm(self) -> Tqdm:
        """Return a bar with tokens as its unit."""
        bar = super().init_predict_tqdm()
        bar.set_description("Harvest")
        bar.unit, bar.unit_scale = " tokens", True
        bar.bar_format = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        return bar

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Set the bar's total before the first batch."""
        if batch_idx == 0 and not self.predict_progress_bar.disable:
            data: DocumentWindows = trainer.datamodule  # type: ignore[attr-defined]
            runs = data.todo[trainer.global_rank :: trainer.world_size]
            self.predict_progress_bar.reset(sum(run.windows for run in runs) * data.window)
            self.predict_progress_bar.initial = 0
            self.predict_progress_bar.set_description("Harvest")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the tokens of a batch."""
        if not self.predict_progress_bar.disable:
            self.predict_progress_bar.update(batch.tokens.numel())
