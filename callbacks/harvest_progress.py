"""The harvest's progress bar counts tokens, not batches."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class HarvestProgress(TQDMProgressBar):
    """Tokens done, tokens a second and time left, of this process's share."""

    def init_predict_tqdm(self) -> Tqdm:
        bar = super().init_predict_tqdm()
        bar.set_description("Harvest")
        bar.unit, bar.unit_scale = " tokens", True
        bar.bar_format = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        return bar

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not self.predict_progress_bar.disable:
            data = trainer.datamodule
            mine = data.todo[trainer.global_rank :: trainer.world_size]
            self.predict_progress_bar.reset(sum(run.windows for run in mine) * data.window)
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
        if not self.predict_progress_bar.disable:
            self.predict_progress_bar.update(batch.tokens.numel())
