"""Gates distilled through the frozen LM: they learn from what it loses when keys go. For `fit` and `validate`."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from datamodules.token_windows import TokenWindows, WindowBatch
from lightning_modules.lr_schedules import total_steps, warmup_then_cosine
from lightning_modules.resuming import Resuming
from smartkv.distillation.kl_divergence import divergence
from smartkv.distillation.soft_attention import HIDDEN, soft_eviction
from smartkv.distillation.soft_keep import footprint, hard_keep, keep_share
from smartkv.distillation.warm_start import one_output_per_age, single_output
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED
from smartkv.models.key_hooks import read_keys
from smartkv.models.layer_ranges import format_layers
from smartkv.policies.budgets import Calibration, price_curve, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule

TARGET = "log worth"  # of a key, in nats a token for the whole cache
START = {"low": 0.35, "high": 0.05}  # of what lies beyond windows, kept at first at the lowest and the highest price


class DistilledGates(Resuming):
    """KL divergence from the full cache, plus price × footprint, through a soft visibility mask.

    A window draws its price at random, log-uniformly: what the gates learn is the log of each key's worth, and one
    training serves every footprint.

    Args:
        gates: folder of exported gates, or hub id, to start from.
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: of the LM: auto (bfloat16 where the hardware has it, else float32), float32, bfloat16 or float16.
        ages: tokens, ascending, at which a key may go. All are judged at its birth, by an output each. Until the first
            every key is seen.
        hidden: width of the gates' hidden layer; wider than that of the gates to start from: their units are doubled.
        sinks: tokens at the start that are always seen.
        price_low, price_high: nats a token for the whole cache; prices are drawn between them.
        temperature: of the soft decision at the start of the run, in factors of e of a key's worth.
        temperature_end: at its end; between them it falls geometrically. The cache decides at 0: warm gates learn
            quickly, and cold ones what really happens.
        score_from: queries from this token on count; null: from a quarter of the window on.
        scored_tokens: queries of a window that are compared with the teacher, drawn at random; null: all.
        learning_rate: of Adam, after warm-up.
        warmup_steps: optimiser steps of linear warm-up; cosine decay to 0 follows, over the run.
        calibration_windows: training windows on which the gates' start is brought to the unit of prices, and on which
            the exported gates' prices are solved.
        threads: CPU threads a process.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        gates: str,
        backbone: str = PACKAGED,
        dtype: str = "auto",
        ages: tuple[int, ...] = (16, 64, 256),
        hidden: int = 64,
        sinks: int = 4,
        price_low: float = 0.1,
        price_high: float = 1.6,
        temperature: float = 0.5,
        temperature_end: float = 0.15,
        score_from: int | None = None,
        scored_tokens: int | None = 512,
        learning_rate: float = 2e-3,
        warmup_steps: int = 10,
        calibration_windows: int = 4,
        threads: int = 2,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.frozen: list[Backbone] = []  # in a list: the LM is no submodule, so DDP and checkpoints leave it alone
        self.bank: GateBank | None = None

    @property
    def lm(self) -> Backbone:
        return self.frozen[0]

    # -- what is trained ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.bank is not None:
            return
        h = self.hparams
        if not h.ages or list(h.ages) != sorted(set(h.ages)) or h.ages[0] < 1:
            raise SmartKVError(f"ages must be numbers of tokens, ascending, the first at least 1, got {list(h.ages)}")
        for name in ("temperature", "temperature_end", "learning_rate", "price_low", "calibration_windows", "threads"):
            if h[name] <= 0:
                raise SmartKVError(f"{name} must be above 0, got {h[name]}")
        if h.price_high <= h.price_low:
            raise SmartKVError(f"price_high must be above price_low, got {h.price_low} to {h.price_high}")
        torch.set_num_threads(h.threads)
        device = self.trainer.strategy.root_device
        self.frozen.append(load_backbone(h.backbone, h.dtype, device, trust_remote_code=h.trust_remote_code))
        self.lm.model.requires_grad_(False)
        start = single_output(GateBank.from_pretrained(h.gates, self.lm.model)).to(device)
        if start.ages and start.ages != tuple(h.ages):
            raise SmartKVError(f"the gates in {h.gates} judge for ages {list(start.ages)}, not for {list(h.ages)}")
        if start.outputs not in (1, len(h.ages)) or len(start.layers) != self.lm.architecture.layers:
            raise SmartKVError(
                f"distillation starts from gates of all layers with one output, or one for each of {len(h.ages)} ages: "
                f"those in {h.gates} have {start.outputs} for layers {format_layers(start.layers)}"
            )
        if start.details.get("target") != TARGET:
            self._in_nats(start)
        self.bank = one_output_per_age(start, h.ages, h.hidden).requires_grad_(True).train()

    def setup(self, stage: str) -> None:
        data: TokenWindows = self.trainer.datamodule
        if data.backbone != self.hparams.backbone:
            raise SmartKVError(
                f"model.backbone is '{self.hparams.backbone}', data.backbone '{data.backbone}': they must be the same"
            )
        first = self.hparams.score_from
        self.first_query = data.window // 4 if first is None else first
        if not self.hparams.sinks <= self.first_query < data.window - 1:
            raise SmartKVError(
                f"score_from must lie between sinks and the window of {data.window}, got {self.first_query}"
            )

    @torch.no_grad()
    def _in_nats(self, gates: GateBank) -> None:
        """Bring the figures of gates that predict something else to the unit of prices, by a straight line, so that
        they keep the shares `START` at the highest and the lowest price."""
        h, keys = self.hparams, self._keys()
        calibration = Calibration.of(gates, keys, self.first_query)
        policy = HybridPolicy((LayerRule("all", "gated", h.ages[0]),), sinks=h.sinks)
        in_full = float(footprint(torch.zeros(1, keys[0][0].shape[2], 1), h.ages[:1], h.sinks, self.first_query))
        prices = {
            name: solve(policy, in_full + share * (1 - in_full), calibration).price for name, share in START.items()
        }
        scale = math.log(h.price_high / h.price_low) / (prices["high"] - prices["low"])
        gates.weight2.mul_(scale)
        gates.bias2.mul_(scale).add_(math.log(h.price_high) - scale * prices["high"])

    def _keys(self) -> list[list[Tensor]]:
        """Of the first training windows, layer by layer `[1, kv_heads, tokens, head_dim]`."""
        windows = self.trainer.datamodule.plan.of_split("train")[: self.hparams.calibration_windows]
        return [read_keys(self.lm.model, ids) for ids in windows]

    def gates(self) -> GateBank:
        """The gates as they stand now; a copy."""
        return copy.deepcopy(self.bank)

    def details(self) -> dict[str, Any]:
        """What the exported gates' config says of them: also the prices of footprints, on some training windows."""
        data: TokenWindows = self.trainer.datamodule
        h = self.hparams
        policy = HybridPolicy((LayerRule("all", "gated", h.ages[0]),), sinks=h.sinks, name="distilled")
        return {
            "target": TARGET,
            "ages": list(h.ages),
            "sinks": h.sinks,
            "inputs": "keys",
            "policy": policy.to_dict(),
            "prices": price_curve(policy, Calibration.of(self.bank, self._keys(), self.first_query)),
            "training": {
                "backbone": h.backbone,
                "sources": data.plan.sources,
                "window": data.window,
                "windows": data.counts,
                "settings": {k: v for k, v in h.items() if not k.startswith("_")},
            },
        }

    # -- steps ----------------------------------------------------------------------------------------------------

    def temperature(self) -> float:
        """Of this step."""
        start, end, steps = self.hparams.temperature, self.hparams.temperature_end, total_steps(self.trainer)
        share = self.global_step / max(1.0, steps - 1) if math.isfinite(steps) else 0.0
        return start * (end / start) ** min(1.0, share)

    def losses(
        self, ids: Tensor, price: float, places: Tensor, temperature: float | None, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Divergence (nats a token, over the queries at `places`) and footprint of one window.

        Args:
            ids: int64 `[tokens]`.
            price: log of nats.
            temperature: of the soft decision; None: keys stay or go, as in the cache.
            teacher: what `full` returns of these ids; None: it is computed.
        """
        h, kept = self.hparams, []

        def log_keep(layer: int, keys: Tensor) -> Tensor:
            worth = self.bank.predict(layer, keys.detach())
            if temperature is None:
                keep = hard_keep(worth, price).float()
                log = HIDDEN * (1 - keep)
            else:
                keep, log = keep_share(worth, price, temperature)
            kept.append(keep[0])
            return log.movedim(-1, 0)

        base = self.lm.model.base_model
        teacher = self.full(ids) if teacher is None else teacher
        with soft_eviction(self.lm.model, log_keep, h.ages, h.sinks):
            hidden = base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        lost = divergence(hidden[places], teacher[places], self.lm.model.get_output_embeddings())
        return lost, footprint(torch.cat(kept), h.ages, h.sinks, self.first_query)

    @torch.no_grad()
    def full(self, ids: Tensor) -> Tensor:
        """Last hidden states under a full cache, `[tokens, hidden]`."""
        return self.lm.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        low, high = math.log(self.hparams.price_low), math.log(self.hparams.price_high)
        temperature = self.temperature()
        total = self.bank.bias2.sum() * 0  # a process without a window still takes part in every step
        for number, ids in zip(batch.number.tolist(), batch.tokens, strict=True):
            # what is drawn depends on the step and the window alone, not on how many processes there are
            generator = torch.Generator().manual_seed(self.global_step * 1_000_003 + number)
            price = low + (high - low) * float(torch.rand((), generator=generator))
            places = torch.arange(self.first_query, len(ids))
            if self.hparams.scored_tokens is not None:
                places = places[torch.randperm(len(places), generator=generator)[: self.hparams.scored_tokens]].sort()[
                    0
                ]
            lost, kept = self.losses(ids, price, places.to(ids.device), temperature)
            total = total + lost + math.exp(price) * kept
            self.log_dict({"train_divergence": lost.detach(), "train_footprint": kept.detach()}, batch_size=1)
        # DDP averages gradients over processes; dividing by all windows makes that the mean over the whole batch
        loss = total * self.trainer.world_size / batch.global_windows
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """At the lowest, the middle and the highest price, keys staying or going as in the cache."""
        low, high = math.log(self.hparams.price_low), math.log(self.hparams.price_high)
        for ids in batch.tokens:
            places, total = torch.arange(self.first_query, len(ids), device=ids.device), 0.0
            teacher = self.full(ids)
            for name, price in (("low", low), ("middle", (low + high) / 2), ("high", high)):
                lost, kept = self.losses(ids, price, places, temperature=None, teacher=teacher)
                total += float(lost + math.exp(price) * kept) / 3
                figures = {f"val_divergence/{name}": lost, f"val_footprint/{name}": kept}
                self.log_dict(figures, batch_size=1, sync_dist=True)
            self.log("val_loss", total, prog_bar=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.bank.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.98))
        return warmup_then_cosine(optimizer, self.trainer, self.hparams.warmup_steps)
