"""Harvest: a frozen LM over windows; keys and labels out of its own attention step. For `predict`."""

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.shard_plan import WindowRun
from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, check_window, label_window
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED
from smartkv.shards.manifest import shard_header


class Harvest(L.LightningModule):
    """Takes the windows of one shard a step, one window a forward pass.

    Args:
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: auto (bfloat16 where the hardware has it, else float32), float32, bfloat16 or float16.
        thresholds: attention probabilities that count as a hit; lifespans are recorded for each.
        ages: tokens; future attention is recorded from these ages on.
        follow_up: tokens; the span of future attention, and what gates are trained on.
        sinks: tokens at the start of a window that are left out of training and scoring.
        post_rope: also record the keys after the rotary embedding (doubles the disk space).
        threads: CPU threads a process. Fixed, because results may differ in the last bit with another number.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        backbone: str = PACKAGED,
        dtype: str = "auto",
        thresholds: tuple[float, ...] = (0.02, 0.05, 0.11),
        ages: tuple[int, ...] = (128,),
        follow_up: int = 1024,
        sinks: int = 4,
        post_rope: bool = False,
        threads: int = 2,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.thresholds, self.ages, self.follow_up = tuple(thresholds), tuple(ages), follow_up
        self.backbone, self.dtype_name, self.sinks = backbone, dtype, sinks
        self.post_rope, self.threads, self.trust_remote_code = post_rope, threads, trust_remote_code
        self.frozen: list[Backbone] = []  # in a list: the LM is no submodule, so DDP and checkpoints leave it alone

    @property
    def lm(self) -> Backbone:
        return self.frozen[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the bytes of a shard, beside the windows."""
        return {
            "backbone": self.backbone,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "post_rope": self.post_rope,
            "threads": self.threads,
        }

    @property
    def header(self) -> dict[str, Any]:
        """The metadata of every shard of this run, as JSON gives it back."""
        own = shard_header(self.lm.fingerprint, self.spec, self.trainer.datamodule.window, self.sinks)
        return own | {"arguments": self.arguments}

    def setup(self, stage: str) -> None:
        if self.sinks < 0 or self.threads < 1:
            raise SmartKVError(f"sinks must be at least 0 and threads at least 1, got {self.sinks} and {self.threads}")
        self.spec = LabelSpec(self.thresholds, self.ages, self.follow_up)
        torch.set_num_threads(self.threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        data = self.trainer.datamodule
        if data.backbone != self.backbone:
            raise SmartKVError(
                f"model.backbone is '{self.backbone}', data.backbone '{data.backbone}': they must be the same"
            )
        if self.spec.follow_up >= data.window - self.sinks:
            raise SmartKVError(
                f"follow_up {self.spec.follow_up} leaves no key of a window of {data.window} tokens to train on"
            )
        if not self.frozen:
            options = {"trust_remote_code": self.trust_remote_code}
            device = self.trainer.strategy.root_device  # `self.device` is still the CPU at this point
            self.frozen.append(load_backbone(self.backbone, self.dtype_name, device, **options))
        check_window(self.lm.model, data.window)
        data.check_shards(self.header)
        data.clear_away()

    def predict_step(self, run: WindowRun, batch_idx: int) -> dict[str, Tensor]:
        """The tensors of one shard (see `smartkv.shards.manifest`), all its windows one after another."""
        windows = [label_window(self.lm.model, tokens, self.spec, self.post_rope) for tokens in run.tokens]
        shard = {
            "keys": torch.cat([w.keys for w in windows], dim=2),
            "lifespan": torch.cat([w.lifespan for w in windows], dim=3),
            "horizon": torch.cat([w.horizon for w in windows]),
            **run.tensors(),
        }
        if self.post_rope:
            shard["keys_post_rope"] = torch.cat([w.keys_post_rope for w in windows], dim=2)
        if self.spec.ages:
            shard["future_attention"] = torch.cat([w.future_attention for w in windows], dim=3)
        return shard
