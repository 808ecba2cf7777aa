"""Writing of shards during a harvest, and of the manifest at its end."""

import shlex
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from datamodules.documents import DocumentWindows
from datamodules.shard_plan import WindowRun
from eval.common.interrupts import is_step
from lightning_modules.harvest import Harvest
from smartkv.shards.manifest import Manifest
from smartkv.shards.shard_file import write_shard


class ShardWriter(BasePredictionWriter):
    """Callback that writes each shard to the datamodule's `out` and keeps none in memory.

    The manifest is written at the end, when all shards are there. A `fast_dev_run` writes nothing.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Harvest) -> None:
        """Keep the predictions out of memory."""
        trainer.predict_loop.return_predictions = False  # true by default

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Harvest,
        prediction: dict[str, Tensor],
        batch_indices: Any,
        batch: WindowRun,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one shard."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: DocumentWindows = trainer.datamodule  # type: ignore[attr-defined]
        write_shard(data.out / batch.file, prediction, pl_module.header)

    def teardown(self, trainer: L.Trainer, pl_module: Harvest, stage: str) -> None:
        """Write the manifest if all shards are there; otherwise print how many are missing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # not in on_predict_end, which a process without shards skips
        trainer.strategy.barrier("all shards are written")
        data: DocumentWindows = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and (missing := _missing_shards(data)):
            print(
                f"{missing} shards are not in {data.out}, so there is no manifest yet: run the same "
                "command again; all processes have to write into one folder"
            )
        elif trainer.is_global_zero:
            manifest = _manifest(pl_module, data)
            manifest.write()
            print(
                f"{len(manifest.shards)} shards with {sum(s.tokens for s in manifest.shards):,} tokens "
                f"of {manifest.fingerprint.layers * manifest.fingerprint.kv_heads} heads in {manifest.folder}"
            )
            if not is_step():
                shards, gates = (shlex.quote(str(path)) for path in (manifest.folder, manifest.folder.parent / "gates"))
                command = "python main.py fit -c configs/gates/smollm2.yaml"
                print(f"train gates: {command} --data.shards {shards} --out {gates}")
        trainer.strategy.barrier("the manifest is written")


def _missing_shards(data: DocumentWindows) -> int:
    """Return the number of shards without a file.

    There are some after a run limited to a few batches, or if processes wrote into different folders.
    """
    return sum(not (data.out / run.file).exists() for run in data.runs)


def _manifest(module: Harvest, data: DocumentWindows) -> Manifest:
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return Manifest(
        folder=Path(data.out),
        fingerprint=module.lm.fingerprint,
        spec=module.spec,
        window=data.window,
        sinks=module.sinks,
        sources=data.plan.sources,
        documents=data.plan.documents,
        arguments={**data.arguments, **module.arguments, "versions": versions},
        shards=[data.entries.get(run.file) or data.entry(run) for run in data.runs],
    )
