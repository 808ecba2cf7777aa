"""A model learns to live with a sparse cache: LoRA while keys are dropped. For `fit` and `validate`."""

import copy
import json
import math
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from datamodules.token_windows import TokenWindows, WindowBatch
from lightning_modules.lr_schedules import total_steps, warmup_then_cosine
from lightning_modules.resuming import Resuming
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.class_names import bare_class_paths
from smartkv.metrics.perplexity import losses_after
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED, PACKAGED_ID
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration, price_curve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.sparsity import Linear, Schedule
from smartkv.sparsity.dropping import Dropping, RandomDropping
from smartkv.sparsity.key_dropout import window_attention
from smartkv.sparsity.losses import hidden_distance, student_loss

UNLIKE = ("threads", "trust_remote_code", "gradient_checkpointing")  # settings that a resumed run may have otherwise
SINKS = 4  # of the sliding window that every run is validated under
CALIBRATION_WINDOWS = 4  # training windows on which prices of gates are solved that learned


class _Restore(L.Callback):
    """A run that fails leaves the model as it was."""

    def on_exception(self, trainer: L.Trainer, pl_module: "EvictionTuning", exception: BaseException) -> None:
        pl_module.open.close()


class EvictionTuning(Resuming):
    """Cross entropy of a student under eviction, and its divergence from the frozen base with a full cache.

    The student is the base with LoRA adapters; the teacher is the same model with the adapters switched off, so it does
    not move. (A hook-based dropout of keys would do the same as the mask; there is none.) Gates that learn too pay
    their price for the footprint, as in distillation.

    Args:
        dropping: how keys go.
        schedule: how many stay, where chance decides.
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: of the LM: auto (bfloat16 where the hardware has it, else float32), float32, bfloat16 or float16. LoRA
            is float32.
        rank, alpha: of LoRA; the update is scaled by alpha / rank.
        targets: modules with adapters.
        ce_weight: of the cross entropy.
        kl_weight: of KL(student ‖ teacher), a mean over tokens.
        hidden_weight: of the squared distance of last hidden states, over the teacher's mean square.
        learning_rate: of AdamW, after warm-up.
        weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; cosine decay to 0 follows.
        seed: of the adapters' start and of what is drawn.
        gradient_checkpointing: activations are computed anew in the backward pass: slower, and little memory.
        threads: CPU threads a process.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        dropping: Dropping = RandomDropping(),  # noqa: B008 - jsonargparse shows it
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
        self.strict_loading = False  # checkpoints hold what is trained, and nothing of the base
        self.student: PeftModel | None = None
        self.open = ExitStack()
        self.steps = math.inf  # of the run
        self.reached: tuple[int, int | None] | None = None  # step of the checkpoint, and how many its run had

    @property
    def lm(self) -> Backbone:
        """The model with its adapters; for caches and measurement."""
        return self.backbone_

    # -- what is trained ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
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
        config = LoraConfig(
            r=h.rank, lora_alpha=h.alpha, target_modules=list(h.targets), lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(h.seed)  # adapters start alike in every process, on every device
            try:
                self.student = get_peft_model(lm.model, config)
            except ValueError as error:
                raise SmartKVError(f"targets {list(h.targets)} are no modules of '{h.backbone}': {error}") from error
        if isinstance(lm.model.get_output_embeddings(), BaseTunerLayer):
            raise SmartKVError(f"targets {list(h.targets)} have the output embedding among them: it is not trained")
        # not the place where its files lie
        base = PACKAGED_ID if h.backbone == PACKAGED else h.backbone
        self.student.peft_config["default"].base_model_name_or_path = base
        if h.gradient_checkpointing:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
            lm.model.enable_input_require_grads()
            for module in lm.model.modules():  # they ask for training mode; dropouts inside stay off
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        self.backbone_ = lm
        self.gates = self.dropping.gates  # a submodule where gates are trained too

    def setup(self, stage: str) -> None:
        data: TokenWindows = self.trainer.datamodule
        if data.backbone != self.hparams.backbone:
            raise SmartKVError(
                f"model.backbone is '{self.hparams.backbone}', data.backbone '{data.backbone}': they must be the same"
            )
        if stage == "fit":
            self.steps = total_steps(self.trainer)
            if self.schedule.needs_end and not math.isfinite(self.steps):
                raise SmartKVError(f"{type(self.schedule).__name__} needs an end: give trainer.max_steps or max_epochs")

    def configure_callbacks(self) -> list[L.Callback]:
        return [_Restore()]

    def configure_optimizers(self) -> dict[str, Any]:
        h, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=h.learning_rate, weight_decay=h.weight_decay)
        return warmup_then_cosine(optimizer, self.trainer, h.warmup_steps)

    # -- steps ----------------------------------------------------------------------------------------------------

    def keep_ratio(self) -> float:
        """Of this step; outside of `fit`, of the checkpoint's."""
        step, steps = self.global_step, self.steps
        if self.trainer.state.fn != "fit" and self.reached is not None:
            step, steps = self.reached[0], self.reached[1] or math.inf
        return self.schedule.keep_ratio(step, int(steps) if math.isfinite(steps) else 1)

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states `[batch, tokens, hidden]`."""
        return self.lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        h, ids = self.hparams, batch.tokens
        self.open.close()
        if not len(ids):  # a process without a window still takes part in every step
            return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0
        teacher = None
        if h.kl_weight or h.hidden_weight:
            with torch.no_grad(), self.student.disable_adapter():
                teacher = self.hidden(ids)[:, :-1].flatten(0, 1)
        ratio = self.keep_ratio()
        # closed after the backward pass, in which checkpointed activations are computed anew under the same rule
        seen = self.open.enter_context(self.dropping.inside(self.lm, ids, ratio, self._seeds(batch)))
        hidden = self.hidden(ids)[:, :-1].flatten(0, 1)
        head = self.lm.model.get_output_embeddings()
        loss = student_loss(hidden, teacher, ids[:, 1:].flatten(), head, h.ce_weight, h.kl_weight)
        total, footprint = loss.total, seen(ids.shape[1] // 4)
        if h.hidden_weight:
            distance = hidden_distance(hidden, teacher)
            self.log("train_hidden", distance.detach(), batch_size=1)
            total = total + h.hidden_weight * distance
        if (price := self.dropping.price()) is not None:
            total = total + price * footprint
        figures = {
            "train_ce": loss.ce.detach(),
            "train_kl": loss.kl.detach(),
            "keep_ratio": ratio,
            "train_footprint": footprint.detach(),
        }
        self.log_dict({name: float(figure) for name, figure in figures.items()}, batch_size=1)
        self.log("train_loss", total.detach(), prog_bar=True, batch_size=1)
        return total * len(ids) * self.trainer.world_size / batch.global_windows

    def _seeds(self, batch: WindowBatch) -> list[int]:
        """What is drawn depends on the step and the window, not on how many processes there are."""
        first = (self.hparams.seed * 1_000_003 + self.global_step) * 1_000_003
        return [(first + number) % 2**63 for number in batch.number.tolist()]

    def on_after_backward(self) -> None:
        self.open.close()

    def teardown(self, stage: str) -> None:
        self.open.close()

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """NLL of the student, nats a token: with a full cache (`val_nll`), under eviction as it is trained at this step
        (`val_nll_dropped`; `val_cost`: how much more), and under a sliding window of an eighth of the text
        (`val_nll_window`), the same for every run."""
        self.log_dict(self._validated(batch), prog_bar=True, batch_size=len(batch.tokens), sync_dist=True)

    @torch.no_grad()
    def _validated(self, batch: WindowBatch) -> dict[str, float]:
        ids = batch.tokens
        if not len(ids):  # windows that do not divide by the processes: of no weight
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
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.schedule.validated(float(self.trainer.callback_metrics["val_cost"]))

    # -- what is kept ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is trained: adapters, and gates where they learn too."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def described(self) -> dict[str, Any]:
        """Which run this is, for JSON: what a checkpoint of it was made with, and the export says."""
        settings = {k: v for k, v in self.hparams.items() if not k.startswith("_") and k not in UNLIKE}
        parts = {"dropping": self.dropping.to_dict(), "schedule": self.schedule.to_dict(), "settings": settings}
        plain: dict[str, Any] = json.loads(json.dumps(parts))
        return plain | {
            "data": self.trainer.datamodule.state_dict(),
            "steps": self.steps if math.isfinite(self.steps) else None,
        }

    @torch.no_grad()
    def tuned_gates(self) -> GateBank | None:
        """Gates that learned, with prices solved for the tuned model; None: none did."""
        if self.gates is None:
            return None
        gates = copy.deepcopy(self.gates).requires_grad_(False)
        texts = self.trainer.datamodule.plan.of_split("train")[:CALIBRATION_WINDOWS]
        keys = [read_keys(self.lm.model, ids) for ids in texts]
        calibration = Calibration.of(gates, keys, len(texts[0]) // 4)
        gates.details |= {"prices": price_curve(HybridPolicy.from_dict(gates.details["policy"]), calibration)}
        return gates.cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["run"] = self.described()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        then, now = bare_class_paths(checkpoint["run"]), self.described()  # older ones hold whole paths
        if unlike := [name for name in now if name not in ("data", "steps") and then.get(name) != now[name]]:
            different = "; ".join(f"{name} {then.get(name)}, now {now[name]}" for name in unlike)
            raise SmartKVError(f"the checkpoint is of another run: {different}. Give this run folders of its own")
        super().on_load_checkpoint(checkpoint)
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.reached = checkpoint["global_step"], then["steps"]
