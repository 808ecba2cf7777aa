"""Progress bar of a fit."""

from lightning.pytorch.callbacks import RichProgressBar


class FitProgress(RichProgressBar):
    """Rich progress bar that counts epochs from 1: of six the last is "Epoch 6/6", where Lightning has "Epoch 5/5"."""

    def _get_train_description(self, current_epoch: int) -> str:
        total = self.trainer.max_epochs
        description = f"Epoch {current_epoch + 1}" + (f"/{total}" if total is not None and total > 0 else "")
        return f"{description:{len(self.validation_description)}}"  # bars of one length do not flicker
