"""TensorBoard's pictures of the heads, and the table at the end of a fit."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from callbacks.hybrid_cache_perplexity import HybridCachePerplexity
from callbacks.tensorboard_logging import (
    LEARNING_RATE_TAG,
    SUMMARY_TAGS,
    custom_scalars_layout,
    logged_step,
    tensorboard_logger,
    tensorboard_writer,
)
from datamodules.distributed import process_of, sum_over_processes
from datamodules.lifespan_shards import LifespanShards
from datamodules.online_keys import OnlineKeys
from eval.common.console import make_console
from eval.common.figures import heads_heatmap, lifespan_histogram, predicted_against_true
from lightning_modules.gates import LifespanGates
from smartkv.errors import SmartKVError
from smartkv.gates.bank import head_name
from smartkv.metrics.nulls import score_nulls


class HeadDashboard(L.Callback):
    """Callback that shows how well each head's gate predicts.

    TensorBoard gets the R² of the nulls (`val_r2_null/…`), the learning rate (`lr`), a heatmap of R² by layer and head
    (`heads/r2`), histograms of prediction against truth (`heads/predicted_against_true`), a layout of custom scalars
    with one card a question, and the hyperparameters with the final figures. At its end a fit prints a table by layer
    and writes `heads.csv` with every head into the run's folder.

    Args:
        sample_windows: validation windows whose keys are counted in the histograms.
    """

    def __init__(self, sample_windows: int = 4) -> None:
        """Keep the number of windows; nothing is measured yet."""
        self.sample_windows = sample_windows
        self.nulls: dict[str, torch.Tensor] = {}  # null -> R² of each gate, `[gates]`

    def on_fit_start(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Check that there is an R² to draw.

        Raises:
            SmartKVError: the module's objective is not log4 lifespan.
        """
        if not isinstance(pl_module, LifespanGates) or not pl_module.objective.in_log4:
            raise SmartKVError(
                "HeadDashboard draws R² of log4 lifespan, which this run's objective does not have: "
                "leave it out of the callbacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Score the nulls, where the keys lie in shards, and lay out TensorBoard's custom scalars."""
        data: LifespanShards | OnlineKeys = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, LifespanShards):  # online keys are gone before nulls could learn from them
            # every process reads its share: if one read all, the others' waiting would time out in a long run
            rank, world = process_of(trainer)
            sum_up = partial(sum_over_processes, trainer)
            share = slice(rank, None, world)
            scores = score_nulls(data.rows, pooled=True, share=share, sum_over_processes=sum_up)
            self.nulls = {name: sums.r2() for name, sums in scores.items()}
        writer = tensorboard_writer(trainer)
        if writer is None or not trainer.is_global_zero:
            return
        for name, r2 in self.nulls.items():
            writer.add_scalar(f"val_r2_null/{name}", float(r2.nanmean()), trainer.global_step)
        eviction = any(isinstance(callback, HybridCachePerplexity) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        writer.add_custom_scalars(custom_scalars_layout(eviction))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LifespanGates, *_: Any) -> None:
        """Write the learning rate as often as the Trainer logs, and at the first step."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_global_zero and (step == 1 or step % every == 0):
            writer = tensorboard_writer(trainer)
            if writer is not None:
                writer.add_scalar(LEARNING_RATE_TAG, trainer.optimizers[0].param_groups[0]["lr"], logged_step(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Draw the heatmap of R² and the histograms."""
        writer = tensorboard_writer(trainer)
        if writer is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        r2 = _last_r2(pl_module)
        grid = r2.view(len(pl_module.bank.layers), -1).numpy()
        title = f"R² on validation windows, mean {r2.mean():.3f}"
        figure = heads_heatmap(grid, pl_module.bank.layers, title, "R²")
        writer.add_figure("heads/r2", figure, logged_step(trainer))
        writer.add_figure("heads/predicted_against_true", self._histograms(trainer, pl_module), logged_step(trainer))

    @torch.no_grad()
    def _histograms(self, trainer: L.Trainer, module: LifespanGates) -> Figure:
        """Draw prediction against truth for the worst, the median and the best head."""
        data: LifespanShards | OnlineKeys = trainer.datamodule  # type: ignore[attr-defined]
        rows, r2 = data.rows, _last_r2(module)
        blocks = data.first_blocks("validation")[: self.sample_windows]
        prediction = torch.cat([module(rows.keys(block).to(module.device)).cpu() for block in blocks], dim=1).numpy()
        truth = rows.target(*blocks).numpy()
        order = r2.argsort().tolist()
        chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
        panels, limit = {}, float(np.log2(rows.follow_up) / 2)
        for name, gate in chosen.items():
            head = head_name(*module.bank.heads[gate])
            panels[f"{name}: {head}, R² {r2[gate]:.3f}"] = lifespan_histogram(prediction[gate], truth[gate], limit)
        return predicted_against_true(panels, limit)

    def on_fit_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Write the hyperparameters with the final figures and `heads.csv`, and print the table by layer."""
        if not trainer.is_global_zero or pl_module.val_r2_head is None:
            return
        logger = tensorboard_logger(trainer)
        if logger is not None:
            final = {f"hp/{tag}": float(trainer.callback_metrics[tag]) for tag in SUMMARY_TAGS}
            rows = trainer.datamodule.rows  # type: ignore[attr-defined]
            settings = {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")}
            settings |= {"threshold": rows.threshold, "inputs": rows.inputs}
            logger.log_hyperparams(settings, metrics=final)
            logger.save()
        console = make_console()
        console.print(self._table(pl_module))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write_heads(_heads_file(trainer), pl_module)
            console.print(f"every head: {_heads_file(trainer)}", highlight=False)

    def results(self, trainer: L.Trainer) -> list[Path]:
        """Return the file of an earlier run."""
        return [file for file in [_heads_file(trainer)] if file.is_file()]

    def _columns(self, module: LifespanGates) -> dict[str, torch.Tensor]:
        """Return R² of the last validation and of the nulls, and the first and last epoch's loss: `[gates]` each."""
        columns = {"R²": _last_r2(module), **{f"R² {name}": r2 for name, r2 in self.nulls.items()}}
        epochs = [entry for entry in module.loss_history if "train" in entry]
        for entry in epochs[:1] + epochs[-1:]:
            columns[f"loss, epoch {entry['epoch'] + 1}"] = torch.tensor(entry["train"])
        return columns

    def _write_heads(self, path: Path, module: LifespanGates) -> None:
        columns = self._columns(module)
        rows = zip(module.bank.heads, *(values.tolist() for values in columns.values()), strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["head", *columns])
            writer.writerows([head_name(*head), *values] for head, *values in rows)

    def _table(self, module: LifespanGates) -> Table:
        columns = self._columns(module)
        table = Table(title="Gates by layer, mean over KV heads")
        for name in ("layer", *columns):
            table.add_column(name.replace("_", " "), justify="right")
        by_layer = [v.view(len(module.bank.layers), -1).nanmean(dim=1).tolist() for v in columns.values()]
        for layer, *cells in zip(module.bank.layers, *by_layer, strict=True):
            table.add_row(str(layer), *(f"{cell:.3f}" for cell in cells))
        table.add_section()
        table.add_row("mean", *(f"{float(value.nanmean()):.3f}" for value in columns.values()))
        return table


def _heads_file(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "heads.csv"


def _last_r2(module: LifespanGates) -> torch.Tensor:
    """Return the R² of each head at the last validation, float64 `[gates]`."""
    assert module.val_r2_head is not None, "the callback's hooks run after a validation"
    return module.val_r2_head
