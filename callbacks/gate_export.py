"""Export of the best gates so far to a folder that `GateBank.from_pretrained` reads."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.distillation import DistilledGates
from lightning_modules.gates import LifespanGates
from smartkv.errors import SmartKVError
from smartkv.io.atomic import delete_partial_files


class GateExport(L.Callback):
    """Callback that writes safetensors, config and model card after each validation that is the best so far.

    A run without a validation exports its gates at its end.

    Args:
        out: folder.
        monitor: logged figure that is compared.
        mode: max: a larger figure is better; min: a smaller one is.
        per_head: also write one file per head, `l{layer}_h{head}.safetensors`, into `out`/heads.
        dtype: of the file: float32, or float16, which halves it and rounds weights to 11 bits.
        name: name with which the model card loads the gates, such as a hub id; null: the folder.
    """

    def __init__(
        self,
        out: str,
        monitor: str = "val_r2_mean",
        mode: Literal["max", "min"] = "max",
        per_head: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
        name: str | None = None,
    ) -> None:
        self.dtype, self.name = getattr(torch, dtype), name
        self.out, self.monitor, self.per_head, self.sign = Path(out), monitor, per_head, 1 if mode == "max" else -1
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state; exports of one run with another figure or name have states of their own."""
        return self._generate_state_key(monitor=self.monitor, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the best figure so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best figure so far."""
        self.best = state_dict["best"]

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Delete what a killed export left half written."""
        delete_partial_files(self.out)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Export the gates if the validation is the best so far.

        Raises:
            SmartKVError: the monitored figure is not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise SmartKVError(f"GateExport monitors {self.monitor}, which is not logged here: try val_loss, mode min")
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if self.best is None or value > self.best or not (self.out / "config.json").exists():
            self.best = value if self.best is None else max(self.best, value)
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Export the gates of a run in which there was no validation."""
        if self.best is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._export(trainer, pl_module)

    @rank_zero_only
    def _export(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        gates = pl_module.gates().cpu().to(self.dtype)
        metrics = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if "/" not in k}
        details = pl_module.details()
        details["training"] |= {"epoch": trainer.current_epoch, "step": trainer.global_step}
        gates.details = details | {"metrics": metrics} | ({"name": self.name} if self.name else {})
        gates.save_pretrained(self.out)
        if self.per_head:
            gates.export_heads(self.out / "heads")
