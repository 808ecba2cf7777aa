"""Export of tuned adapters to a folder that peft and transformers read without SmartKV."""

import copy
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.eviction_tuning import EvictionTuning
from smartkv.errors import SmartKVError
from smartkv.io.atomic import delete_partial_files, write_atomically

DONE = "training.json"  # written last, so a folder with this file is complete
COMPARED = 64  # tokens on which the merged model is compared with the adapter


class AdapterExport(L.Callback):
    """Callback that exports an `EvictionTuning` run when it ends, and its adapter at each checkpoint.

    `checkpoint-N` beside the folder, with N the optimiser step, gets the adapter as peft reads it. The folder gets the
    adapter (safetensors), the tokenizer and `schedule.json`; trained gates in `gates`; on request the model with the
    adapter merged in, as float32, in `merged`; and last `training.json` with the run's settings. The merged
    model is written once its logits are those of the adapter.

    Args:
        out: folder. Null: `final` in the Trainer's `default_root_dir`.
        merged: also write the merged model.
    """

    def __init__(self, out: str | None = None, merged: bool = False) -> None:
        self.out, self.merged = out, merged
        self.exported, self.saved_step = False, -1

    def folder(self, trainer: L.Trainer) -> Path:
        """Return the folder of the export."""
        return Path(trainer.default_root_dir) / "final" if self.out is None else Path(self.out)

    def results(self, trainer: L.Trainer) -> list[Path]:
        """Return the files of an earlier export."""
        folder = self.folder(trainer)
        names = (DONE, "schedule.json", "adapter_config.json", "adapter_model.safetensors")
        parts = [folder / part / name for part in ("gates", "merged") for name in ("config.json", "model.safetensors")]
        checkpoints = sorted(folder.parent.glob("checkpoint-*/adapter_*"))
        return [file for file in [*(folder / name for name in names), *parts, *checkpoints] if file.is_file()]

    def on_fit_start(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        """Forget the export of an earlier fit."""
        self.exported = False

    @rank_zero_only
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: EvictionTuning, checkpoint: dict[str, Any]) -> None:
        """Save the adapter of this step beside the folder of the export; once, as `last` is saved too."""
        folder = self.folder(trainer).parent / f"checkpoint-{trainer.global_step}"
        if self.saved_step == trainer.global_step and folder.is_dir():
            return
        with tempfile.TemporaryDirectory(prefix=".checkpoint.", dir=_made(folder.parent)) as temporary:
            pl_module.student.save_pretrained(temporary)
            files = [path for path in Path(temporary).iterdir() if path.is_file()]
            for file in sorted(files, key=lambda path: path.name == "adapter_config.json"):  # what peft looks for, last
                write_atomically(folder / file.name, file.read_bytes())
        self.saved_step = trainer.global_step

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

    def summary(self, trainer: L.Trainer) -> list[str]:
        """Return lines for the end of a fit: where the adapter is, what it achieved, and how to measure it."""
        folder = self.folder(trainer)
        cost = trainer.callback_metrics.get("val_cost")
        achieved = "" if cost is None else f" (eviction costs {float(cost):.4f} nats a token on validation windows)"
        backbone = trainer.lightning_module.hparams["backbone"]
        options = {"backbone": backbone, "adapter": folder, "out": folder.parent / "compare"}
        given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
        return [
            f"adapter:    {folder}{achieved}",
            f"measure it: python -m eval compare --config configs/eval/eit.yaml {given}",
        ]

    @rank_zero_only
    def _export(self, trainer: L.Trainer, pl_module: EvictionTuning) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        out = self.folder(trainer)
        out.mkdir(parents=True, exist_ok=True)
        delete_partial_files(out)
        (out / DONE).unlink(missing_ok=True)
        pl_module.student.save_pretrained(str(out))
        pl_module.lm.tokenizer.save_pretrained(out)
        schedule = {
            "schedule": type(pl_module.schedule).__name__,
            "state": pl_module.schedule.state_dict(),
            "keep_ratio": pl_module.keep_ratio(),
            "step": trainer.global_step,
        }
        write_atomically(out / "schedule.json", json.dumps(schedule, indent=1).encode())
        if (gates := pl_module.tuned_gates()) is not None:
            gates.save_pretrained(out / "gates")
        if self.merged:
            device = pl_module.lm.model.device  # may lack the memory for a second copy
            student = copy.deepcopy(pl_module.student.cpu())
            pl_module.student.to(device)
            ids = trainer.datamodule.plan.of_split("train")[0][:COMPARED]  # type: ignore[attr-defined]
            merge(student, ids).save_pretrained(out / "merged")
            pl_module.lm.tokenizer.save_pretrained(out / "merged")
        write_atomically(out / DONE, json.dumps(pl_module.described(), indent=1).encode())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@torch.inference_mode()
def merge(student: PeftModel, ids: Tensor) -> PreTrainedModel:
    """Merge adapters into the weights of a model, in place, and compare the logits before and after.

    The result is float32: bfloat16 would round away the adapters' small changes. An output embedding that shares its
    weight with an adapted module, as in models with tied embeddings, gets a weight of its own first, because an adapter
    changes the one and not the other.

    Args:
        student: the model with its adapters, on the CPU.
        ids: token ids `[tokens]` to compare on.

    Raises:
        SmartKVError: the logits are not those of the adapters.
    """
    student.float()
    base: Any = student.get_base_model()
    head, ids = base.get_output_embeddings(), ids.long()[None]
    adapted = [m.get_base_layer().weight for m in student.modules() if isinstance(m, BaseTunerLayer)]
    if any(weight is head.weight for weight in adapted):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    expected = student(input_ids=ids, use_cache=False).logits
    with student.disable_adapter():
        change = (expected - student(input_ids=ids, use_cache=False).logits).abs().max()
    merged: PreTrainedModel = student.merge_and_unload()
    error = (merged(input_ids=ids, use_cache=False).logits - expected).abs().max()
    if not error <= 0.01 * change + 1e-4 * expected.abs().max():  # float32 rounds far less; NaN fails
        raise SmartKVError(
            f"the merged model is not written: its logits are up to {float(error):.2g} off those of the adapter, which "
            f"changes the model by {float(change):.2g}. The adapter itself is written; give merged: false"
        )
    return merged
