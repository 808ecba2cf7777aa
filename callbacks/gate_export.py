"""Export the gates each time they are the best so far: a folder that `GateBank.from_pretrained` reads."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.gates import LifespanGates
from smartkv.gates import format_layers


class GateExport(L.Callback):
    """Writes safetensors, config and model card after a validation that is better than all before.

    Args:
        out: the folder.
        monitor: logged figure that decides; larger is better.
        per_head: also write one file a head, `l{layer}_h{head}.safetensors`, into `out`/heads.
    """

    def __init__(self, out: str, monitor: str = "val_r2_mean", per_head: bool = False) -> None:
        self.out, self.monitor, self.per_head = Path(out), monitor, per_head
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or value > self.best or not (self.out / "config.json").exists():
            self.best = value if self.best is None else max(self.best, value)
            self._export(trainer, pl_module)

    @rank_zero_only
    def _export(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        gates = pl_module.gates().cpu()
        rows = trainer.datamodule.rows
        manifest = rows.manifest
        metrics = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if "/" not in k}
        gates.details = {
            "target": "log4 lifespan",
            "threshold": rows.threshold,
            "follow_up": rows.follow_up,
            "sinks": manifest.sinks,
            "inputs": rows.inputs,
            "layers": format_layers(rows.layers),
            "training": {
                "backbone": manifest.arguments["backbone"],
                "sources": manifest.sources,
                "window": manifest.window,
                "windows": {
                    split: sum(s.windows for s in manifest.of_split(split)) for split in ("train", "validation")
                },
                "keys_a_head": sum(block.stop - block.start for block in rows.blocks("train")),
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "settings": {k: v for k, v in pl_module.hparams.items() if not k.startswith("_")},
            },
            "metrics": metrics,
        }
        gates.save_pretrained(self.out)
        if self.per_head:
            gates.export_heads(self.out / "heads")
