"""Export of tuned adapters to a folder that peft and transformers read without SmartKV."""

import copy
import json
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.eviction_tuning import EvictionTuning
from smartkv.io.atomic import delete_partial_files, write_atomically

DONE = "training.json"  # written last, so a folder with this file is complete


class AdapterExport(L.Callback):
    """Callback that exports an `EvictionTuning` run when it ends.

    The folder gets the adapter (safetensors), the tokenizer and `schedule.json`; trained gates in `gates`; on request
    the model with the adapter merged in, as float32, in `merged`; and last `training.json` with the run's settings.

    Args:
        out: folder, such as runs/eit/final.
        merged: also write the merged model.
    """

    def __init__(self, out: str, merged: bool = False) -> None:
        self.out, self.merged = Path(out), merged
        self.exported = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        """Forget the export of an earlier fit."""
        self.exported = False

    def on_train_end(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        """Export the adapter."""
        self.exported = True
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        """Export the adapter of a resumed run without steps left, which skips `on_train_end`.

        A run that is killed between its last step and its export resumes like this.
        """
        if not self.exported:
            self._export(trainer, pl_module)

    @rank_zero_only
    def _export(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.out.mkdir(parents=True, exist_ok=True)
        delete_partial_files(self.out)
        (self.out / DONE).unlink(missing_ok=True)
        pl_module.student.save_pretrained(str(self.out))
        pl_module.lm.tokenizer.save_pretrained(self.out)
        schedule = {
            "schedule": type(pl_module.schedule).__name__,
            "state": pl_module.schedule.state_dict(),
            "keep_ratio": pl_module.keep_ratio(),
            "step": trainer.global_step,
        }
        write_atomically(self.out / "schedule.json", json.dumps(schedule, indent=1).encode())
        if (gates := pl_module.tuned_gates()) is not None:
            gates.save_pretrained(self.out / "gates")
        if self.merged:  # float32: bfloat16 would round away the adapter's small changes
            device = pl_module.lm.model.device  # may lack the memory for a second copy
            student = copy.deepcopy(pl_module.student.cpu()).float()
            pl_module.student.to(device)
            student.merge_and_unload().save_pretrained(self.out / "merged")
            pl_module.lm.tokenizer.save_pretrained(self.out / "merged")
        write_atomically(self.out / DONE, json.dumps(pl_module.described(), indent=1).encode())
