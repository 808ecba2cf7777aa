"""Write each shard as it is made, and the manifest when all are there."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from datamodules.documents import DocumentWindows
from datamodules.shard_plan import WindowRun
from lightning_modules.harvest import Harvest
from smartkv.shards.manifest import Manifest
from smartkv.shards.shard_file import write_shard


class ShardWriter(BasePredictionWriter):
    """Shards go to the datamodule's `out`; nothing is kept in memory."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Harvest) -> None:
        trainer.predict_loop.return_predictions = False  # true by default, and would keep every shard in memory

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
        data: DocumentWindows = trainer.datamodule
        write_shard(data.out / batch.file, prediction, pl_module.header)

    def teardown(self, trainer: L.Trainer, pl_module: Harvest, stage: str) -> None:
        # not in on_predict_end, which a process without shards to make never sees
        trainer.strategy.barrier("all shards are written")
        if trainer.is_global_zero and (left := _left(trainer.datamodule)):
            print(
                f"{left} shards are not in {trainer.datamodule.out}, so there is no manifest yet: run the same command "
                "again; all processes have to write into one folder"
            )
        elif trainer.is_global_zero:
            manifest = _manifest(pl_module, trainer.datamodule)
            manifest.write()
            print(
                f"{len(manifest.shards)} shards with {sum(s.tokens for s in manifest.shards):,} tokens "
                f"of {manifest.fingerprint.layers * manifest.fingerprint.kv_heads} heads in {manifest.folder}"
            )
        trainer.strategy.barrier("the manifest is written")


def _left(data: DocumentWindows) -> int:
    """Shards that are not there: of a run limited to a few batches, or of processes that wrote somewhere else."""
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
