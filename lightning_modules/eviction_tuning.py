"""A model learns to live with a sparse cache: LoRA while keys are dropped. For `fit` and `validate`."""

from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from datamodules.token_windows import TokenWindows, WindowBatch
from lightning_modules.schedules import total_steps, warmup_then_cosine
from smartkv import backbones
from smartkv.backbones import Backbone, load_backbone
from smartkv.errors import SmartKVError
from smartkv.perplexity import losses_after
from smartkv.sparsity import Linear, Schedule
from smartkv.sparsity.losses import hidden_distance, student_loss
from smartkv.sparsity.mask_sources import Dropping, RandomDropping


class EvictionTuning(L.LightningModule):
    """Cross entropy of a student under eviction, and its divergence from the frozen base with a full cache.

    The student is the base with LoRA adapters; the teacher is the same model with the adapters switched off, so it does
    not move. (A hook-based dropout of keys would do the same as the mask; there is none.)

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
        gradient_checkpointing: activations are computed anew in the backward pass: slower, and little memory.
        threads: CPU threads a process.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        dropping: Dropping = RandomDropping(),  # noqa: B008 - jsonargparse shows it
        schedule: Schedule = Linear(),  # noqa: B008
        backbone: str = backbones.PACKAGED,
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
        torch.set_num_threads(h.threads)
        lm = load_backbone(h.backbone, h.dtype, self.trainer.strategy.root_device, h.trust_remote_code)
        self.dropping.prepare(lm)
        config = LoraConfig(
            r=h.rank, lora_alpha=h.alpha, target_modules=list(h.targets), lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)  # adapters start alike in every process
        try:
            self.student = get_peft_model(lm.model, config)
        except ValueError as error:
            raise SmartKVError(f"targets {list(h.targets)} are no modules of '{h.backbone}': {error}") from error
        torch.random.set_rng_state(generator)
        if h.gradient_checkpointing:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
            lm.model.enable_input_require_grads()
        self.backbone_ = lm
        self.gates = self.dropping.gates  # a submodule where gates are trained too

    def setup(self, stage: str) -> None:
        data: TokenWindows = self.trainer.datamodule
        if data.backbone != self.hparams.backbone:
            raise SmartKVError(
                f"model.backbone is '{self.hparams.backbone}', data.backbone '{data.backbone}': they must be the same"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        h, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=h.learning_rate, weight_decay=h.weight_decay)
        return warmup_then_cosine(optimizer, self.trainer, h.warmup_steps)

    # -- steps ----------------------------------------------------------------------------------------------------

    def keep_ratio(self) -> float:
        """Of this step."""
        steps = total_steps(self.trainer)
        return self.schedule.keep_ratio(self.global_step, int(steps) if steps < 1e12 else 1)

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states `[batch, tokens, hidden]`."""
        return self.lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        h, ids = self.hparams, batch.tokens
        if not len(ids):  # a process without a window still takes part in every step
            return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0
        teacher = None
        if h.kl_weight or h.hidden_weight:
            with torch.no_grad(), self.student.disable_adapter():
                teacher = self.hidden(ids)[:, :-1].flatten(0, 1)
        ratio = self.keep_ratio()
        # closed after the backward pass, in which checkpointed activations are computed anew under the same rule
        self.open.enter_context(self.dropping.inside(self.lm, ids, ratio, self._seeds(batch)))
        hidden = self.hidden(ids)[:, :-1].flatten(0, 1)
        head = self.lm.model.get_output_embeddings()
        loss = student_loss(hidden, teacher, ids[:, 1:].flatten(), head, h.ce_weight, h.kl_weight)
        total = loss.total
        if h.hidden_weight:
            distance = hidden_distance(hidden, teacher)
            self.log("train_hidden", distance.detach(), batch_size=1)
            total = total + h.hidden_weight * distance
        figures = {"train_ce": loss.ce, "train_kl": loss.kl, "keep_ratio": ratio}
        self.log_dict(figures, batch_size=1)
        self.log("train_loss", total.detach(), prog_bar=True, batch_size=1)
        return total * len(ids) * self.trainer.world_size / batch.global_windows

    def _seeds(self, batch: WindowBatch) -> list[int]:
        """What is drawn depends on the step and the window, not on how many processes there are."""
        return [self.global_step * 1_000_003 + number for number in batch.number.tolist()]

    def on_after_backward(self) -> None:
        self.open.close()

    def on_exception(self, exception: BaseException) -> None:
        self.open.close()

    def teardown(self, stage: str) -> None:
        self.open.close()

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """NLL of the student with a full cache and under eviction (`val_nll`, `val_nll_dropped`), nats a token."""
        ids = batch.tokens
        ratio = self.keep_ratio()
        full = self._nll(ids)
        with self.dropping.inside(self.lm, ids, ratio, batch.number.tolist()):
            dropped = self._nll(ids)
        figures = {"val_nll": full, "val_nll_dropped": dropped, "val_cost": dropped - full}
        self.log_dict(figures, prog_bar=True, batch_size=len(ids), sync_dist=True)

    def _nll(self, ids: Tensor) -> float:
        hidden = self.hidden(ids)[:, :-1].flatten(0, 1)
        return float(losses_after(self.lm.model, hidden, ids[:, 1:].flatten()).nll.double().mean())

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.schedule.validated(float(self.trainer.callback_metrics["val_nll_dropped"]))

    # -- what is kept ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is trained: adapters, and gates where they learn too."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["schedule"] = self.schedule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.schedule.load_state_dict(checkpoint["schedule"])
