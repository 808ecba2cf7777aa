"""Harvest of keys and labels from the attention of a frozen language model."""

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.shard_plan import WindowRun
from lightning_modules.trainer_settings import SINGLE, check_precision
from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, check_window, label_window
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED
from smartkv.shards.manifest import shard_header


class Harvest(L.LightningModule):
    """Frozen language model that labels the windows of one shard per step, for `predict`.

    Each window has a forward pass of its own.

    Args:
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: auto (bfloat16 where the hardware multiplies it, else float32), float32, bfloat16 or float16.
        thresholds: attention probabilities above which a query hits a key; one lifespan is recorded for each.
        ages: tokens; ages from which future attention is recorded.
        follow_up: tokens; span of future attention. Keys with a shorter horizon are not trained on.
        sinks: tokens at the start of a window that are left out of training and scoring.
        post_rope: also record keys after the rotary embedding (doubles the disk space).
        threads: CPU threads per process; fixed, because another number may change the last bit of a result.
        trust_remote_code: run code that comes with the model.
    """

    trainer: Any  # with its `datamodule`, which Lightning's Trainer does not declare

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
        self.frozen: list[Backbone] = []  # in a list, so that DDP and checkpoints do not see a submodule

    def configure_callbacks(self) -> list[L.Callback]:
        """Return none; this is the first hook of a run.

        Raises:
            SmartKVError: the Trainer has a precision of its own, or a limit that leaves nothing to harvest.
        """
        if self.trainer.limit_predict_batches == 0:
            raise SmartKVError(
                "trainer.limit_predict_batches is 0, so nothing would be harvested: give at least 1, or leave it out"
            )
        check_precision(self.trainer, (SINGLE,), "the language model's dtype is model.dtype, labels are float32")
        return []

    @property
    def lm(self) -> Backbone:
        """The frozen language model."""
        return self.frozen[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that decide the bytes of a shard, besides the windows."""
        own = self.lm.architecture.sliding_windows
        sliding = {"sliding_windows": list(own)} if own else {}
        return sliding | {
            "backbone": self.backbone,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "post_rope": self.post_rope,
            "threads": self.threads,
        }

    @property
    def header(self) -> dict[str, Any]:
        """Metadata of every shard of this run, as it reads back from JSON."""
        own = shard_header(self.lm.fingerprint, self.spec, self.trainer.datamodule.window, self.sinks)
        return own | {"arguments": self.arguments}

    def make_ready(self) -> None:
        """Check the arguments, and load the model unless that was done before.

        Raises:
            SmartKVError: an argument is out of range, or the model cannot be loaded.
        """
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
            device = self.trainer.strategy.root_device  # `self.device` is still the CPU here
            self.frozen.append(load_backbone(self.backbone, self.dtype_name, device, **options))
        check_window(self.lm.model, data.window)

    def setup(self, stage: str) -> None:
        """Load the model, and check existing shards against this run.

        Raises:
            SmartKVError: an argument is out of range, or a shard was made with other settings.
        """
        self.make_ready()
        data = self.trainer.datamodule
        data.check_shards(self.header)
        data.clear_away()

    def predict_step(self, run: WindowRun, batch_idx: int) -> dict[str, Tensor]:
        """Return the tensors of one shard (see `smartkv.shards.manifest`), its windows one after another."""
        windows = [label_window(self.lm.model, tokens, self.spec, self.post_rope) for tokens in run.tokens]
        shard = {
            "keys": torch.cat([w.keys for w in windows], dim=2),
            "lifespan": torch.cat([w.lifespan for w in windows], dim=3),
            "horizon": torch.cat([w.horizon for w in windows]),
            **run.tensors(),
        }
        if self.post_rope:
            shard["keys_post_rope"] = torch.cat(
                [w.keys_post_rope for w in windows if w.keys_post_rope is not None], dim=2
            )
        if self.spec.ages:
            shard["future_attention"] = torch.cat(
                [w.future_attention for w in windows if w.future_attention is not None], dim=3
            )
        return shard
