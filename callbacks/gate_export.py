"""Export the gates each time they are the best so far: a folder that `GateBank.from_pretrained` reads."""

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
    """Writes safetensors, config and model card after a validation that is better than all before.

    Args:
        out: the folder.
        monitor: logged figure that decides.
        mode: max: a larger figure is better; min: a smaller one.
        per_head: also write one file a head, `l{layer}_h{head}.safetensors`, into `out`/heads.
        dtype: of the file: float32, or float16, which is half as large and costs a rounding at the tenth bit.
        name: that the model card gives to `GateBank.from_pretrained`, such as a hub id; null: the folder's.
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
        """Two exports of one run, told apart by figure and name, have each their best."""
        return self._generate_state_key(monitor=self.monitor, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        delete_partial_files(self.out)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise SmartKVError(f"GateExport monitors {self.monitor}, which is not logged here: try val_loss, mode min")
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if self.best is None or value > self.best or not (self.out / "config.json").exists():
            self.best = value if self.best is None else max(self.best, value)
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
