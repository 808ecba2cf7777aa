"""Joint training of all gates of a model on labelled keys."""

import copy
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import R2Score

from datamodules.block_loader import KeyBatch
from datamodules.distributed import failing_together, sum_over_processes
from datamodules.lifespan_shards import LifespanShards
from datamodules.online_keys import OnlineKeys
from lightning_modules.gate_chunks import Predict, in_chunks
from lightning_modules.head_metrics import HeadMean
from lightning_modules.lr_schedules import warmup_then_cosine
from lightning_modules.resuming import Resuming
from lightning_modules.trainer_settings import SINGLE
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank, head_name
from smartkv.gates.objectives import Log4Lifespan, Objective
from smartkv.gates.standardization import Moments
from smartkv.models.layer_ranges import format_layers
from smartkv.policies.budgets import Calibration, solved_details
from smartkv.policies.hybrid import HybridPolicy, LayerRule

CALIBRATION_WINDOWS = 4  # training windows on which the prices of exported gates are solved
RECENT = 16  # latest tokens that the policy of exported gates keeps, as the shipped gates do
CHUNK = 2**20  # float32 activations per layer and chunk of gates on a CPU; fits its caches


class LifespanGates(Resuming):
    """Gates trained on labels of keys, one small MLP per KV head, for `fit` and `validate`.

    The loss is the sum over heads of each head's mean over rows, so every head is trained as if it were alone.

    Args:
        hidden: width of each gate's hidden layer.
        objective: target and loss; None: `Log4Lifespan`.
        learning_rate: of AdamW after warm-up.
        weight_decay: of AdamW, on weights and not on biases.
        warmup_steps: optimiser steps of linear warm-up; a cosine to 0 at the end of the run follows.

    Attributes:
        bank: the gates, on standardised keys.
        val_r2_head: R² of each head at the last validation, float64 `[gates]`.
        loss_history: one entry per epoch with its number and the losses of each head.
        key_mean: mean of the training keys, float32 `[gates, head_dim]`.
        key_std: their standard deviation, float32 `[gates, head_dim]`.
        standardised: the two are computed, bool scalar.
    """

    FIT_ONLY = frozenset({"learning_rate", "weight_decay", "warmup_steps"})

    PRECISIONS = (SINGLE, "64-true", "bf16-mixed", "16-mixed")

    key_mean: Tensor
    key_std: Tensor
    standardised: Tensor
    val_r2: R2Score
    train_loss_head: HeadMean
    val_loss_head: HeadMean

    def __init__(
        self,
        hidden: int = 64,
        objective: Objective | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.objective = Log4Lifespan() if objective is None else objective
        self.save_hyperparameters(ignore="objective")  # a checkpoint must hold no object
        self.save_hyperparameters({"objective": self.objective.to_dict()})
        self.bank: GateBank = None  # type: ignore[assignment] # until configure_model
        self.val_r2_head: Tensor | None = None
        self.loss_history: list[dict[str, Any]] = []  # {"epoch", "train": [gates], "val": [gates]}

    # -- what is trained ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the gates for the model and the layers of the datamodule.

        Raises:
            SmartKVError: an argument is out of range.
        """
        if self.bank is not None:
            return
        for name in ("hidden", "learning_rate"):
            if (value := self.hparams[name]) <= 0:
                raise SmartKVError(f"{name} must be above 0, got {value}")
        data: LifespanShards | OnlineKeys = self.trainer.datamodule
        fingerprint = data.rows.manifest.fingerprint
        self.bank = GateBank(fingerprint, data.rows.layers, self.hparams.hidden, self.objective.outputs)
        gates = len(self.bank)
        self.register_buffer("key_mean", torch.zeros(gates, fingerprint.head_dim))
        self.register_buffer("key_std", torch.ones(gates, fingerprint.head_dim))
        self.register_buffer("standardised", torch.tensor(False))
        # float64: R² is a difference of large sums
        self.val_r2 = R2Score(multioutput="raw_values").set_dtype(torch.float64)
        self.train_loss_head, self.val_loss_head = HeadMean(gates), HeadMean(gates)

    def setup(self, stage: str) -> None:
        """Check that this process's validation keys are finite."""
        data = self.trainer.datamodule
        with failing_together():
            for block in data.first_blocks("validation"):
                data.rows.checked_keys(block)  # those of training are checked in on_fit_start

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Compute mean and std of the training keys, and start each gate at its mean target.

        Without shards, these are the keys of the first windows. A resumed run has the values in its checkpoint.
        """
        super().on_fit_start()
        if self.standardised:
            return
        data: LifespanShards | OnlineKeys = self.trainer.datamodule
        moments = Moments.zeros(len(self.bank), self.bank.fingerprint.head_dim, self.bank.outputs)
        with failing_together():
            for block in data.first_blocks("train"):
                moments.update(data.rows.checked_keys(block), self.objective.targets(data.rows.labels(block)))
        sum_over_processes(self.trainer, moments.tensors())
        mean, std, target = moments.result()
        self.key_mean.copy_(mean)
        self.key_std.copy_(std)
        self.bank.bias2.copy_(self.objective.start(target)[:, None])
        self.standardised.fill_(True)

    def forward(self, keys: Tensor) -> Tensor:
        """Return the objective's score, float32 `[gates, rows]`, of raw keys `[gates, rows, head_dim]`."""
        return self.objective.score(self.predict(keys))

    def predict(self, keys: Tensor) -> Tensor:
        """Return all outputs, float32 `[gates, rows, outputs]`, of raw keys `[gates, rows, head_dim]`."""
        return self.bank(self._standardise(keys, slice(None)))

    def _standardise(self, keys: Tensor, gates: slice) -> Tensor:
        # in place: allocating another float32 tensor costs more than the arithmetic
        return (keys.float() - self.key_mean[gates, None]).div_(self.key_std[gates, None])

    def _gates_at_once(self, keys: Tensor) -> int:
        gates, rows, head_dim = keys.shape
        if self.device.type != "cpu":
            return gates
        return max(1, CHUNK // max(1, rows * max(head_dim, self.hparams.hidden)))

    def gates(self) -> GateBank:
        """Return the current gates for raw keys, with the standardisation folded in."""
        return self.bank.folded(self.key_mean, self.key_std)

    def details(self) -> dict[str, Any]:
        """Return the details in the exported gates' config."""
        rows = self.trainer.datamodule.rows
        manifest = rows.manifest
        return {
            "target": self.objective.target,
            "objective": self.objective.settings,
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
                "settings": {k: v for k, v in self.hparams.items() if not k.startswith("_")},
            },
        }

    def policy_with_prices(self, gates: GateBank) -> dict[str, Any]:
        """Solve prices of footprints on some training windows.

        Layers without gates keep all their keys.

        Args:
            gates: exported gates of this run.

        Returns:
            The `policy` and `prices` that `policy_of` reads, and `layer_shares` (see `solved_details`); nothing for
            gates that a cache cannot use.
        """
        if gates.details["inputs"] != "keys":  # a cache gives gates the keys before the rotary embedding
            return {}
        data: LifespanShards | OnlineKeys = self.trainer.datamodule
        own = data.rows.manifest.sliding_windows
        others = sorted(set(range(gates.fingerprint.layers)) - set(gates.layers))
        rules = [LayerRule(format_layers(gates.layers), "gated", RECENT)]
        rules += [LayerRule(format_layers(others), "full")] if others else []
        policy = HybridPolicy(tuple(rules), sinks=gates.details["sinks"], name="gates")
        keys = [[layer.cpu() for layer in window] for window in data.calibration_keys(CALIBRATION_WINDOWS)]
        solved = solved_details(policy, Calibration.of(gates, keys, keys[0][0].shape[2] // 4, own))
        return {"policy": policy.to_dict(), **solved} if solved["prices"] else {}

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: KeyBatch, batch_idx: int) -> Tensor:
        """Return the sum over heads of each head's mean loss over the rows of the batch."""
        target = self.objective.targets(batch.labels)

        def row_losses(predict: Predict, gates: slice) -> Tensor:
            return self.objective.row_loss(predict(self._standardise(batch.keys[gates], gates)), target[gates])

        losses, total = in_chunks(self.bank, row_losses, self._gates_at_once(batch.keys))
        self.train_loss_head.update(losses)
        # DDP averages gradients over processes; this factor turns that into the mean over the whole batch
        loss = total * self.trainer.world_size / batch.global_rows
        self.log("train_loss", loss.detach() / len(self.bank), prog_bar=True, sync_dist=True)  # mean over processes
        return loss

    def validation_step(self, batch: KeyBatch, batch_idx: int) -> None:
        """Add the batch to R² and loss of each head."""
        prediction = self.predict(batch.keys)
        score = self.objective.score(prediction)
        self.val_r2.update(score.T.double(), batch.target.T.double())
        self.val_loss_head.update(self.objective.row_loss(prediction, self.objective.targets(batch.labels)))

    def on_validation_epoch_end(self) -> None:
        """Log loss and R²: a summary, and each head."""
        # metrics are summed over processes, so every process logs the same values
        loss = self.val_loss_head.compute().reshape(-1)
        self.val_loss_head.reset()
        self.log("val_loss", loss.mean().float())
        self._log_heads("val_loss_head", loss)
        if self.objective.in_log4:
            r2 = self.val_r2.compute().reshape(-1)  # torchmetrics returns a scalar for a single head
            self.val_r2_head = r2.cpu()
            self.log("val_r2_mean", r2.mean().float(), prog_bar=True)
            for name, share in (("median", 0.5), ("p10", 0.1), ("min", 0.0)):
                self.log(f"val_r2_{name}", r2.quantile(share).float())
            self._log_heads("val_r2_head", r2)
        self.val_r2.reset()
        if not self.trainer.sanity_checking:
            self.loss_history.append({"epoch": self.current_epoch, "val": loss.tolist()})

    def on_train_epoch_end(self) -> None:
        """Log the training loss of each head."""
        loss = self.train_loss_head.compute().reshape(-1)
        self.train_loss_head.reset()
        self._log_heads("train_loss_head", loss)
        if self.loss_history and self.loss_history[-1]["epoch"] == self.current_epoch:
            self.loss_history[-1]["train"] = loss.tolist()

    def _log_heads(self, name: str, values: Tensor) -> None:
        heads = zip(self.bank.heads, values.float(), strict=True)
        self.log_dict({f"{name}/{head_name(*head)}": value for head, value in heads})

    # -- optimisation and checkpoints -----------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with warm-up and cosine decay; biases have no weight decay."""
        weights = [p for name, p in self.bank.named_parameters() if name.startswith("weight")]
        biases = [p for name, p in self.bank.named_parameters() if name.startswith("bias")]
        groups = [
            {"params": weights, "weight_decay": self.hparams.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate)
        return warmup_then_cosine(optimizer, self.trainer, self.hparams.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the loss history and the running training loss."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss_history"] = copy.deepcopy(self.loss_history)  # of now, also if it is written later
        checkpoint["train_loss_head"] = self.train_loss_head.sums()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the loss history and the running training loss."""
        super().on_load_checkpoint(checkpoint)
        self.loss_history = checkpoint["loss_history"]
        if "train_loss_head" in checkpoint and self.trainer.is_global_zero:  # the sums are of all processes
            self.train_loss_head.go_on_from(checkpoint["train_loss_head"])
