"""What TensorBoard shows of the heads, and the table at the end of a fit."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from callbacks.pictures import heads_heatmap, predicted_against_true
from lightning_modules.gates import LifespanGates, head_name
from smartkv.nulls import score_nulls
from smartkv.scores import RegressionSums

SUMMARY_TAGS = ["val_r2_mean", "val_r2_median", "val_r2_p10", "val_r2_min"]


class HeadDashboard(L.Callback):
    """Nulls, heatmap of R² by layer and head, predicted-against-true histograms, custom scalar layout, hparams with the
    final figure, and a table by layer.

    Args:
        sample_windows: validation windows whose keys are drawn in the histograms.
    """

    def __init__(self, sample_windows: int = 4) -> None:
        self.sample_windows = sample_windows
        self.nulls: dict[str, RegressionSums] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        if not trainer.is_global_zero:
            return
        self.nulls = score_nulls(trainer.datamodule.rows)
        writer = _writer(trainer)
        if writer is None:
            return
        for name, sums in self.nulls.items():
            writer.add_scalar(f"val_r2_null/{name}", float(sums.r2().nanmean()), trainer.global_step)
        writer.add_custom_scalars(_layout(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        writer = _writer(trainer)
        if writer is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        r2 = pl_module.val_r2_head
        grid = r2.view(len(pl_module.bank.layers), -1).numpy()
        title = f"R² on validation windows, mean {r2.mean():.3f}"
        figure = heads_heatmap(grid, pl_module.bank.layers, title, "R²")
        writer.add_figure("heads/r2", figure, trainer.global_step)
        writer.add_figure("heads/predicted_against_true", self._histograms(trainer, pl_module), trainer.global_step)

    @torch.no_grad()
    def _histograms(self, trainer: L.Trainer, module: LifespanGates) -> Any:
        rows = trainer.datamodule.rows
        blocks = rows.blocks("validation")[: self.sample_windows]
        prediction = torch.cat([module(rows.keys(block).to(module.device)).cpu() for block in blocks], dim=1).numpy()
        truth = torch.cat([rows.target(block) for block in blocks], dim=1).numpy()
        order = module.val_r2_head.argsort().tolist()
        chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
        panels = {}
        for name, gate in chosen.items():
            head = head_name(*module.bank.heads[gate])
            panels[f"{name}: {head}, R² {module.val_r2_head[gate]:.3f}"] = (prediction[gate], truth[gate])
        return predicted_against_true(panels, float(np.log2(rows.follow_up) / 2))

    def on_fit_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        if not trainer.is_global_zero or pl_module.val_r2_head is None:
            return
        logger = _logger(trainer)
        if logger is not None:
            final = {f"hp/{tag}": float(trainer.callback_metrics[tag]) for tag in SUMMARY_TAGS}
            data = {"threshold": trainer.datamodule.rows.threshold, "inputs": trainer.datamodule.rows.inputs}
            settings = {k: v for k, v in pl_module.hparams.items() if not k.startswith("_")}
            logger.log_hyperparams({**settings, **data}, metrics=final)
            logger.save()
        Console().print(self.table(pl_module))

    def table(self, module: LifespanGates) -> Table:
        """R² of the last validation beside the nulls, and training losses of the first and last epoch, by layer."""
        table = Table(title="Gates by layer: mean over KV heads, last epoch")
        epochs = [entry for entry in module.loss_history if "train" in entry]
        columns = ["R²", *(f"R² {name}" for name in self.nulls)]
        values = [module.val_r2_head, *(sums.r2() for sums in self.nulls.values())]
        if epochs:
            columns += [f"loss, epoch {epochs[0]['epoch']}", f"loss, epoch {epochs[-1]['epoch']}"]
            values += [torch.tensor(epochs[0]["train"]), torch.tensor(epochs[-1]["train"])]
        table.add_column("layer", justify="right")
        for column in columns:
            table.add_column(column, justify="right")
        by_layer = [value.view(len(module.bank.layers), -1).nanmean(dim=1).tolist() for value in values]
        for layer, *cells in zip(module.bank.layers, *by_layer, strict=True):
            table.add_row(str(layer), *(f"{cell:.3f}" for cell in cells))
        table.add_section()
        table.add_row("mean", *(f"{float(value.nanmean()):.3f}" for value in values))
        return table


def _logger(trainer: L.Trainer) -> TensorBoardLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def _writer(trainer: L.Trainer) -> Any:
    logger = _logger(trainer)
    return None if logger is None else logger.experiment


def _layout(module: LifespanGates) -> dict[str, Any]:
    """TensorBoard's "custom scalars": the summary in one chart, and a chart a layer."""
    by_layer: dict[str, Any] = {}
    for layer, head in module.bank.heads:
        chart = by_layer.setdefault(f"layer {layer:02d}", ["Multiline", []])
        chart[1].append(f"val_r2_head/{head_name(layer, head)}")
    return {"R²": {"summary": ["Multiline", SUMMARY_TAGS]}, "R² by layer": by_layer}
