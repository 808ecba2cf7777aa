"""Eviction tuning: LoRA adapters trained while keys are dropped, so that the model adapts to a sparse cache."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from datamodules.token_windows import TokenWindows, WindowBatch
from lightning_modules.lr_schedules import total_steps, warmup_then_cosine
from lightning_modules.resuming import Resuming
from lightning_modules.trainer_settings import SINGLE
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.standardization import StandardizedGates
from smartkv.io.class_names import bare_class_paths
from smartkv.metrics.perplexity import losses_after
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED, PACKAGED_ID
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration, solved_details
from smartkv.policies.hybrid import HybridPolicy
from smartkv.sparsity import Linear, Schedule
from smartkv.sparsity.dropping import Dropping, RandomDropping
from smartkv.sparsity.key_dropout import window_attention
from smartkv.sparsity.losses import hidden_distance, student_loss

SINKS = 4  # sinks of the sliding window under which every run is validated
CALIBRATION_WINDOWS = 4  # training windows on which the prices of trained gates are solved


class _Restore(L.Callback):
    """Callback that restores the model's attention when a run fails."""

    def on_exception(self, trainer: L.Trainer, pl_module: "EvictionTuning", exception: BaseException) -> None:
        pl_module.open.close()


class EvictionTuning(Resuming):
    """LoRA trained on cross entropy under eviction and on divergence from the full cache, for `fit` and `validate`.

    The student is the model with LoRA adapters, and keys are dropped by a mask in its attention. The teacher is the
    same model with the adapters switched off and a full cache; it is not trained. If gates are trained too, the loss
    also has price × footprint, as in distillation.

    Args:
        dropping: which keys are dropped.
        schedule: keep ratio over the run, for random dropping.
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: of the language model: auto (bfloat16 where the hardware multiplies it, else float32), float32 or
            bfloat16. Adapters are float32.
        rank: LoRA rank.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: names of the modules that get adapters.
        ce_weight: weight of the cross entropy.
        kl_weight: weight of KL(student ‖ teacher), mean over tokens.
        hidden_weight: weight of the squared distance of the last hidden states, relative to the teacher's mean square.
        learning_rate: of AdamW after warm-up.
        weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; a cosine to 0 at the end of the run follows.
        seed: seed of the adapters' initial weights and of random drops.
        gradient_checkpointing: recompute activations in the backward pass: slower, less memory.
        threads: CPU threads per process.
        trust_remote_code: run code that comes with the model.
    """

    FREE = Resuming.FREE | {"gradient_checkpointing"}
    FIT_ONLY = frozenset(
        {"ce_weight", "kl_weight", "hidden_weight", "learning_rate", "weight_decay", "warmup_steps", "seed"}
    )

    PRECISIONS = (SINGLE, "bf16-mixed", "16-mixed")  # the others would convert the language model too

    backbone_: Backbone
    gates: StandardizedGates | None

    def __init__(
        self,
        dropping: Dropping = RandomDropping(),  # noqa: B008 - jsonargparse prints the default
        schedule: Schedule = Linear(),  # noqa: B008
        backbone: str = PACKAGED,
        dtype: str = "auto",
        rank: int = 64,
        alpha: float = 128.0,
        targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 10,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        threads: int = 2,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["dropping", "schedule"])
        self.dropping, self.schedule = dropping, schedule
        self.strict_loading = False  # checkpoints hold trained parameters alone
        self.student: PeftModel = None  # type: ignore[assignment] # until configure_model
        self.open = ExitStack()
        self.steps = math.inf  # optimiser steps of the run
        self.reached: tuple[int, int | None] | None = None  # step of the checkpoint, and its run's steps

    @property
    def lm(self) -> Backbone:
        """The model with its adapters, for caches and measurement."""
        return self.backbone_

    # -- what is trained ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model, and add the adapters.

        Raises:
            SmartKVError: an argument is out of range, or the strategy or a target is not supported.
        """
        if self.student is not None:
            return
        h = self.hparams
        for name in ("rank", "alpha", "learning_rate", "threads"):
            if h[name] <= 0:
                raise SmartKVError(f"{name} must be above 0, got {h[name]}")
        weights = (h.ce_weight, h.kl_weight, h.hidden_weight)
        if min(weights) < 0 or not any(weights):
            raise SmartKVError(f"ce_weight, kl_weight and hidden_weight must be 0 or more and not all 0, got {weights}")
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise SmartKVError("adapters and a frozen model of another dtype are not sharded: give strategy ddp")
        torch.set_num_threads(h.threads)
        lm = load_backbone(h.backbone, h.dtype, self.trainer.strategy.root_device, h.trust_remote_code)
        if lm.model.dtype == torch.float16:
            raise SmartKVError("float16 has too little range for gradients: give dtype bfloat16 or float32")
        self.dropping.prepare(lm)
        self.dropping.begin(lm, self._calibration_windows())
        config = LoraConfig(
            r=h.rank, lora_alpha=h.alpha, target_modules=list(h.targets), lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(h.seed)  # the same initial adapters in every process, on every device
            try:
                self.student = get_peft_model(lm.model, config)
            except ValueError as error:
                raise SmartKVError(f"targets {list(h.targets)} are no modules of '{h.backbone}': {error}") from error
        if isinstance(lm.model.get_output_embeddings(), BaseTunerLayer):
            raise SmartKVError(f"targets {list(h.targets)} have the output embedding among them: it is not trained")
        # the hub id, not the local path of the packaged file
        base = PACKAGED_ID if h.backbone == PACKAGED else h.backbone
        self.student.peft_config["default"].base_model_name_or_path = base
        if h.gradient_checkpointing:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
            lm.model.enable_input_require_grads()
            for module in lm.model.modules():  # checkpointing asks for training mode; dropout inside stays off
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        self.backbone_ = lm
        self.gates = self.dropping.gates  # a submodule if gates are trained too

    def setup(self, stage: str) -> None:
        """Check the arguments against the datamodule and the trainer.

        Raises:
            SmartKVError: the backbones differ, or the schedule needs a run with an end.
        """
        data: TokenWindows = self.trainer.datamodule
        if data.backbone != self.hparams.backbone:
            raise SmartKVError(
                f"model.backbone is '{self.hparams.backbone}', data.backbone '{data.backbone}': they must be the same"
            )
        if stage == "fit":
            self.steps = total_steps(self.trainer)
            if self.trainer.limit_val_batches == 0 and self.schedule.needs_validation:
                raise SmartKVError(
                    f"{type(self.schedule).__name__} is decided by validations, which limit_val_batches 0 leaves out: "
                    "allow them, or give another schedule"
                )
            if self.schedule.needs_end and not math.isfinite(self.steps):
                raise SmartKVError(f"{type(self.schedule).__name__} needs an end: give trainer.max_steps or max_epochs")

    def configure_callbacks(self) -> list[L.Callback]:
        """Return those of every run, and the callback that restores the model when the run fails."""
        return [*super().configure_callbacks(), _Restore()]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW on adapters and trained gates, with warm-up and cosine decay."""
        h, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=h.learning_rate, weight_decay=h.weight_decay)
        return warmup_then_cosine(optimizer, self.trainer, h.warmup_steps)

    # -- steps ----------------------------------------------------------------------------------------------------

    def keep_ratio(self) -> float:
        """Return the keep ratio of this step; outside of `fit`, that of the checkpoint's step."""
        step, steps = self.global_step, self.steps
        if self.trainer.state.fn != "fit" and self.reached is not None:
            step, steps = self.reached[0], self.reached[1] or math.inf
        return self.schedule.keep_ratio(step, int(steps) if math.isfinite(steps) else 1)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states `[batch, tokens, hidden]` of ids `[batch, tokens]`."""
        return self.lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        """Return the student's loss on the batch."""
        h, ids = self.hparams, batch.tokens
        self.open.close()
        if not len(ids):  # a process without a window takes part in every step
            return torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()
        teacher = None
        if h.kl_weight or h.hidden_weight:
            with torch.no_grad(), self.student.disable_adapter():
                teacher = self.hidden(ids)[:, :-1].flatten(0, 1)
        ratio = self.keep_ratio()
        # closed after the backward pass, which recomputes checkpointed activations under the same mask
        seen = self.open.enter_context(self.dropping.inside(self.lm, ids, ratio, self._seeds(batch)))
        hidden = self.hidden(ids)[:, :-1].flatten(0, 1)
        head = self.lm.model.get_output_embeddings()
        loss = student_loss(hidden, teacher, ids[:, 1:].flatten(), head, h.ce_weight, h.kl_weight)
        total, footprint = loss.total, seen(ids.shape[1] // 4)
        if h.hidden_weight and teacher is not None:
            distance = hidden_distance(hidden, teacher)
            self.log("train_hidden", distance.detach(), batch_size=1)
            total = total + h.hidden_weight * distance
        if (price := self.dropping.price()) is not None:
            total = total + price * footprint
        figures: dict[str, Tensor | float] = {
            "train_ce": loss.ce.detach(),
            "train_kl": loss.kl.detach(),
            "keep_ratio": ratio,
            "train_footprint": footprint.detach(),
        }
        self.log_dict({name: float(figure) for name, figure in figures.items()}, batch_size=1)
        self.log("train_loss", total.detach(), prog_bar=True, batch_size=1)
        return total * len(ids) * self.trainer.world_size / batch.global_windows

    def _seeds(self, batch: WindowBatch) -> list[int]:
        """Return a seed per window; it depends on the step and the window, not on the number of processes."""
        first = (self.hparams.seed * 1_000_003 + self.global_step) * 1_000_003
        return [(first + number) % 2**63 for number in batch.number.tolist()]

    def on_after_backward(self) -> None:
        """Restore the model's attention."""
        self.open.close()

    def teardown(self, stage: str) -> None:
        """Restore the model's attention."""
        self.open.close()

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Log the student's NLL in nats per token.

        `val_nll` is with a full cache, `val_nll_dropped` under the eviction of this training step, and `val_cost` their
        difference. `val_nll_window` is under a sliding window of an eighth of the text, the same for every run.
        """
        self.log_dict(self._validated(batch), prog_bar=True, batch_size=len(batch.tokens), sync_dist=True)

    @torch.no_grad()
    def _validated(self, batch: WindowBatch) -> dict[str, float]:
        ids = batch.tokens
        if not len(ids):  # a process without a window: the batch has no weight
            return dict.fromkeys(("val_nll", "val_nll_dropped", "val_cost", "val_nll_window"), 0.0)
        full = self._nll(ids)
        with self.dropping.inside(self.lm, ids, self.keep_ratio(), batch.number.tolist()):
            dropped = self._nll(ids)
        with window_attention(self.lm.model, max(1, ids.shape[1] // 8), SINKS, *ids.shape):
            narrow = self._nll(ids)
        return {"val_nll": full, "val_nll_dropped": dropped, "val_cost": dropped - full, "val_nll_window": narrow}

    def _nll(self, ids: Tensor) -> float:
        hidden = self.hidden(ids)[:, :-1].flatten(0, 1)
        return float(losses_after(self.lm.model, hidden, ids[:, 1:].flatten()).nll.double().mean())

    def on_validation_epoch_end(self) -> None:
        """Tell the schedule the cost of eviction."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.schedule.validated(float(self.trainer.callback_metrics["val_cost"]))

    # -- checkpoints and export -----------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what is trained: adapters, and gates with the units of their keys if they are trained too."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs).items()
        return {name: value for name, value in state if name in trained or name.startswith("gates.")}

    def _calibration_windows(self) -> Iterator[Tensor]:
        """Yield token ids of the first training windows, int64 `[tokens]`, which are read only where gates learn."""
        yield from self.trainer.datamodule.plan.of_split("train")[:CALIBRATION_WINDOWS]

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the result, with the dtype that `auto` chose."""
        dtype = str(self.lm.model.dtype).removeprefix("torch.")
        parts = {"dropping": self.dropping.to_dict(), "schedule": self.schedule.to_dict()}
        return json.loads(json.dumps(parts)) | super().settings() | {"dtype": dtype}

    def settings_of(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what `settings` was for a checkpoint, also for one of SmartKV 0.1.0."""
        run = bare_class_paths(checkpoint.get("run", {}))
        parts = {name: run[name] for name in ("dropping", "schedule") if name in run}
        return parts | super().settings_of(checkpoint)

    def described(self) -> dict[str, Any]:
        """Return the settings and data of this run as JSON values, for its checkpoints and its export."""
        settings = self.settings()
        parts = {name: settings.pop(name) for name in ("dropping", "schedule")}
        return parts | {
            "settings": settings,
            "data": self.trainer.datamodule.state_dict(),
            "steps": self.steps if math.isfinite(self.steps) else None,
        }

    @torch.no_grad()
    def tuned_gates(self) -> GateBank | None:
        """Return the trained gates with prices solved for the tuned model, or None if no gates are trained."""
        if self.gates is None:
            return None
        gates, texts = self.gates.raw().requires_grad_(False), list(self._calibration_windows())
        keys = [read_keys(self.lm.model, ids) for ids in texts]
        calibration = Calibration.of(gates, keys, len(texts[0]) // 4, self.lm.architecture.sliding_windows)
        gates.details |= solved_details(HybridPolicy.from_dict(gates.details["policy"]), calibration)
        return gates.cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the schedule's state and the run's settings."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["run"] = self.described()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the schedule, and read the tensors of trained gates also by their old names."""
        if self.gates is not None:
            checkpoint["state_dict"] = self.gates.named_as_here(checkpoint["state_dict"], "gates.")
        super().on_load_checkpoint(checkpoint)
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.reached = checkpoint["global_step"], checkpoint["run"]["steps"]
