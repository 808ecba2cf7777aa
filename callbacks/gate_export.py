"""Export of the best gates so far to a folder that `GateBank.from_pretrained` reads."""

import shlex
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from eval.common.interrupts import is_step
from lightning_modules.distillation import DistilledGates
from lightning_modules.gates import LifespanGates
from smartkv.errors import SmartKVError
from smartkv.gates.bank import CARD, GateBank
from smartkv.gates.model_card import usable_footprint
from smartkv.io.atomic import delete_partial_files, write_atomically


class GateExport(L.Callback):
    """Callback that writes safetensors, config and model card after each validation that is the best so far.

    A run without a validation exports its gates at its end, a `fast_dev_run` none.

    Args:
        out: folder. Null: `export` in the Trainer's `default_root_dir`.
        monitor: logged figure that is compared.
        mode: max: a larger figure is better; min: a smaller one is.
        per_head: also write one file per head, `l{layer}_h{head}.safetensors`, into `out`/heads.
        dtype: of the file: float32, or float16, which halves it and rounds weights to 11 bits.
        name: name with which the model card loads the gates, such as a hub id; null: the folder.
    """

    def __init__(
        self,
        out: str | None = None,
        monitor: str = "val_r2_mean",
        mode: Literal["max", "min"] = "max",
        per_head: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
        name: str | None = None,
    ) -> None:
        self.dtype, self.name = getattr(torch, dtype), name
        self.out, self.monitor, self.per_head = out, monitor, per_head
        self.mode, self.sign = mode, 1 if mode == "max" else -1
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state; exports of one run with another figure or name have states of their own."""
        return self._generate_state_key(monitor=self.monitor, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the best figure so far, and what best means."""
        return {"best": self.best, "mode": self.mode}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates, checkpoint: dict[str, Any]
    ) -> None:
        """Check that a resumed fit goes on comparing the same figure in the same way.

        Raises:
            SmartKVError: another mode, figure or name than the checkpoint's. The best so far would be lost, and worse
                gates would take the place of the exported ones.
        """
        if trainer.state.fn != "fit":
            return
        states = checkpoint.get("callbacks", {})
        then = states.get(self.state_key, {}).get("mode", self.mode)  # version 0.1 did not record it
        here = {each.state_key for each in trainer.callbacks if isinstance(each, GateExport)}  # type: ignore[attr-defined]
        gone = [key for key in states if key.startswith(f"{type(self).__qualname__}{{") and key not in here]
        if then != self.mode:
            changed = f"GateExport.mode {then}, now {self.mode}"
        elif self.state_key not in states and gone:
            changed = f"{gone[0]}, now {self.state_key}"
        else:
            return
        raise SmartKVError(
            f"the checkpoint is of another run: {changed}. Give the checkpoint's settings to go on from it, or start a "
            "run of its own, in its own folder and without --ckpt_path"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best figure so far."""
        self.best = state_dict["best"]

    def folder(self, trainer: L.Trainer) -> Path:
        """Return the folder of the export."""
        return Path(trainer.default_root_dir) / "export" if self.out is None else Path(self.out)

    def results(self, trainer: L.Trainer) -> list[Path]:
        """Return the files of an earlier export."""
        folder = self.folder(trainer)
        files = [folder / name for name in ("model.safetensors", "config.json", "README.md")]
        return [*filter(Path.is_file, files), *folder.glob("heads/l*_h*.safetensors")]

    def setup(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates, stage: str) -> None:
        """Check that no other export of this run has the same folder.

        Raises:
            SmartKVError: one has.
        """
        exports = [each for each in trainer.callbacks if isinstance(each, GateExport)]  # type: ignore[attr-defined]
        if any(each is not self and each.folder(trainer) == self.folder(trainer) for each in exports):
            raise SmartKVError(f"two GateExports write into {self.folder(trainer)}: give each an 'out' of its own")

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Delete what a killed export left half written."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            delete_partial_files(self.folder(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Export the gates if the validation is the best so far.

        Raises:
            SmartKVError: the monitored figure is not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.monitor not in trainer.callback_metrics:
            raise SmartKVError(f"GateExport monitors {self.monitor}, which is not logged here: try val_loss, mode min")
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if self.best is None or value > self.best or not (self.folder(trainer) / "config.json").exists():
            self.best = value if self.best is None else max(self.best, value)
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Export the gates of a run in which there was no validation."""
        if self.best is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._export(trainer, pl_module)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        """Give the exported gates the prices of footprints, once, since solving them takes seconds."""
        if not isinstance(pl_module, LifespanGates) or not (self.folder(trainer) / "config.json").is_file():
            return
        gates = GateBank.from_pretrained(self.folder(trainer))
        if trainer.fast_dev_run or gates.details.get("prices"):  # type: ignore[attr-defined]
            return
        gates.details |= pl_module.policy_with_prices(gates)
        self._save(gates.to(self.dtype), self.folder(trainer))

    def summary(self, trainer: L.Trainer) -> list[str]:
        """Return lines for the end of a fit: where the gates are, what they achieved, how to use them.

        A step of another command leaves the last to that one.
        """
        folder = self.folder(trainer)
        if not (folder / "config.json").is_file():
            return [f"no gates were exported to {folder}: nothing was trained"]
        gates = GateBank.from_pretrained(folder)
        details, achieved = gates.details, gates.details["metrics"].get(self.monitor)
        backbone = shlex.quote(details["training"]["backbone"])
        lines = [f"gates of the last step, without a validation: {folder}"]
        if achieved is not None:
            epoch = details["training"]["epoch"] + 1
            lines = [f"best gates, of epoch {epoch}: {folder} ({self.monitor} {achieved:.4f})"]
        if is_step():
            return lines
        if details.get("prices"):
            footprint = usable_footprint(details["prices"])
            lines.append(f'use them:     LifespanCache(model, gates="{folder}", footprint={footprint})')
        if details["inputs"] == "keys" and len(gates.layers) == gates.fingerprint.layers:
            measure = "python -m eval perplexity --config configs/eval/perplexity.yaml"
            out = shlex.quote(str(folder.parent / "perplexity"))
            lines.append(
                f"measure them: {measure} --gates {shlex.quote(str(folder))} --backbone {backbone} --out {out}"
            )
        return lines

    @rank_zero_only
    def _export(self, trainer: L.Trainer, pl_module: LifespanGates | DistilledGates) -> None:
        gates = pl_module.gates().cpu().to(self.dtype)
        metrics = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if "/" not in k}
        details = pl_module.details()
        details["training"] |= {"epoch": trainer.current_epoch, "step": trainer.global_step}
        gates.details = details | {"metrics": metrics} | ({"name": self.name} if self.name else {})
        self._save(gates, self.folder(trainer))
        if self.per_head:
            gates.export_heads(self.folder(trainer) / "heads")

    def _save(self, gates: GateBank, folder: Path) -> None:
        gates.save_pretrained(folder)
        if self.name is None:  # the card loads the gates from where they are
            write_atomically(folder / CARD, gates.card(str(folder)).encode())
