"""Learning rates over a run."""

import math
from typing import Any

import lightning as L
import torch


def warmup_then_cosine(optimizer: torch.optim.Optimizer, trainer: L.Trainer, warmup: int) -> dict[str, Any]:
    """What `configure_optimizers` returns: linear warm-up over `warmup` steps, then a cosine to 0 over the run."""
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
    """Optimiser steps of the whole run. The Trainer's own estimate would load the data before a checkpoint is
    restored, and so lose the place in the epoch."""
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return by_steps
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(by_steps, trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
