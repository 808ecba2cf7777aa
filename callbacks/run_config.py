"""The config of a run, saved beside its other files."""

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback


class RunConfig(SaveConfigCallback):
    """Callback that saves `config.yaml` when a fit or a harvest begins its work.

    Lightning's own callback saves it before settings, data and checkpoint are checked: a run that is then refused would
    replace the config of the run whose folder it is. A validation leaves that config alone, too.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait until everything is checked."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the config of a fit."""
        super().setup(trainer, pl_module, "fit")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the config of a harvest."""
        super().setup(trainer, pl_module, "predict")
