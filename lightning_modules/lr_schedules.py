"""Learning rate schedules."""

import math

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


def warmup_then_cosine(optimizer: torch.optim.Optimizer, trainer: L.Trainer, warmup: int) -> OptimizerLRSchedulerConfig:
    """Build the return value of `configure_optimizers`: linear warm-up, then a cosine to 0 at the end of the run.

    Args:
        optimizer: the optimiser to schedule.
        trainer: the running trainer; a run without an end stays at the full rate after warm-up.
        warmup: optimiser steps of warm-up.
    """
    total = total_steps(trainer)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if not math.isfinite(total):
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def total_steps(trainer: L.Trainer) -> float:
    """Return the optimiser steps of the whole run, or infinity.

    The Trainer's own estimate would load the data before a checkpoint is restored, and so lose the place in the epoch.
    """
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return by_steps
    loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    batches, limit = len(loader), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(by_steps, trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
