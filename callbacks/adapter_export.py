"""Export of what eviction tuning trained: a folder that plain peft and transformers read."""

import copy
import json
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.eviction_tuning import EvictionTuning
from smartkv.io.atomic import delete_partial_files, write_atomically

DONE = "training.json"  # written last: a folder that has it is whole


class AdapterExport(L.Callback):
    """At the end of the run: the adapter (safetensors), the tokenizer, `schedule.json`, gates that were trained too
    (`gates`), if asked for the model with the adapter merged in (`merged`, float32), and last of all `training.json`,
    which says what it was trained with.

    Args:
        out: the folder, such as runs/eit/final.
        merged: write the merged model as well.
    """

    def __init__(self, out: str, merged: bool = False) -> None:
        self.out, self.merged = Path(out), merged
        self.exported = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        self.exported = False

    def on_train_end(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        self.exported = True
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        """A run that was killed between its last step and this export has no step left, and comes here alone."""
        if not self.exported:
            self._export(trainer, pl_module)

    @rank_zero_only
    def _export(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        if trainer.fast_dev_run:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        delete_partial_files(self.out)
        (self.out / DONE).unlink(missing_ok=True)
        pl_module.student.save_pretrained(self.out)
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
        if self.merged:  # in float32: bfloat16 would round the adapter's small changes away
            where = pl_module.lm.model.device  # which may not hold the model twice
            student = copy.deepcopy(pl_module.student.cpu()).float()
            pl_module.student.to(where)
            student.merge_and_unload().save_pretrained(self.out / "merged")
            pl_module.lm.tokenizer.save_pretrained(self.out / "merged")
        write_atomically(self.out / DONE, json.dumps(pl_module.described(), indent=1).encode())
