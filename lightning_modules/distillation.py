"""Distillation of gates through the frozen language model, on its loss under eviction."""

import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from datamodules.token_windows import TokenWindows, WindowBatch
from lightning_modules.lr_schedules import total_steps, warmup_then_cosine
from lightning_modules.resuming import Resuming
from lightning_modules.trainer_settings import SINGLE
from smartkv.distillation.kl_divergence import divergence
from smartkv.distillation.soft_attention import HIDDEN, soft_eviction
from smartkv.distillation.soft_keep import footprint, hard_keep, keep_share
from smartkv.distillation.warm_start import one_output_per_age, single_output
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.standardization import StandardizedGates
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.gguf import PACKAGED
from smartkv.models.key_hooks import hook_keys, read_keys
from smartkv.models.layer_ranges import format_layers
from smartkv.policies.budgets import Calibration, solve, solved_details
from smartkv.policies.hybrid import HybridPolicy, LayerRule

TARGET = "log worth"  # log of a key's worth, in nats per token for the whole cache
# shares of the keys beyond the window that untrained gates keep at the lowest and the highest price
START = {"low": 0.35, "high": 0.05}
# shares of the keys beyond the window at which gates are compared in validation
COMPARED = {"large": 0.2, "middle": 0.1, "small": 0.04}


class DistilledGates(Resuming):
    """Gates trained on KL divergence from the full cache plus price × footprint, for `fit` and `validate`.

    Evicted keys are hidden by a soft visibility mask, through which gradients reach the gates. Each window draws its
    price log-uniformly. The gates therefore learn the log of each key's worth, and one training serves every footprint.

    Attributes:
        bank: the gates, trained on standardised keys.

    Args:
        gates: gates to start from: a folder, a hub id, or the name of shipped gates.
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: of the language model: auto (bfloat16 where the hardware multiplies it, else float32), float32, bfloat16
            or float16.
        ages: ascending ages in tokens at which a key may be evicted. A gate judges all of them when the key is new, one
            output each. Younger keys are always seen.
        hidden: width of the gates' hidden layer, a multiple of that of the gates to start from; their units are copied.
        sinks: tokens at the start that are always seen.
        price_low: lowest price, in nats per token for the whole cache.
        price_high: highest price, in the same unit.
        temperature: of the soft decision at the start of the run, in units of log worth.
        temperature_end: the same at the end of the run; it falls geometrically in between. The cache decides at
            temperature 0: a high temperature learns quickly, a low one comes close to the cache.
        score_from: first query that counts; null: a quarter of the window.
        scored_tokens: queries of a window compared with the teacher, drawn at random; null: all.
        learning_rate: of Adam after warm-up.
        warmup_steps: optimiser steps of linear warm-up; a cosine to 0 at the end of the run follows.
        calibration_windows: training windows whose keys are standardised, that scale the start to the unit of prices,
            and on which the prices of the exported gates are solved.
        threads: CPU threads per process.
        trust_remote_code: run code that comes with the model.
    """

    FIT_ONLY = frozenset(
        {
            "gates",
            "temperature",
            "temperature_end",
            "scored_tokens",
            "learning_rate",
            "warmup_steps",
            "calibration_windows",
        }
    )

    PRECISIONS = (SINGLE, "64-true")  # autocast would meet the soft mask's float32 inside the attention

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
        self.frozen: list[Backbone] = []  # in a list, so that DDP and checkpoints do not see a submodule
        self.bank: StandardizedGates = None  # type: ignore[assignment] # until configure_model

    @property
    def lm(self) -> Backbone:
        """The frozen language model."""
        return self.frozen[0]

    # -- what is trained ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the language model, and build the gates from those to start from.

        Raises:
            SmartKVError: an argument is out of range, or the gates to start from do not fit.
        """
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
        gated = self.lm.architecture.gated_layers
        if start.outputs not in (1, len(h.ages)) or list(start.layers) != gated:
            raise SmartKVError(
                f"distillation starts from gates of layers {format_layers(gated)} with one output, or one for each of "
                f"{len(h.ages)} ages: those in {h.gates} have {start.outputs} for layers {format_layers(start.layers)}"
            )
        keys = self._keys()
        if start.details.get("target") != TARGET:
            self._in_nats(start, keys)
        gates = StandardizedGates(start, keys)
        gates.bank = one_output_per_age(gates.bank, h.ages, h.hidden)
        self.bank = gates.requires_grad_(True).train()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the tensors of the gates, also by their old names."""
        checkpoint["state_dict"] = self.bank.named_as_here(checkpoint["state_dict"], "bank.")
        super().on_load_checkpoint(checkpoint)

    def setup(self, stage: str) -> None:
        """Check the arguments against those of the datamodule.

        Raises:
            SmartKVError: the backbones differ, or `score_from` is out of range.
        """
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
    def _in_nats(self, gates: GateBank, keys: list[list[Tensor]]) -> None:
        """Scale the outputs of gates with another target to the unit of prices.

        The linear map makes the gates keep the shares `START` at the lowest and the highest price.
        """
        h = self.hparams
        prices = self._prices(START, Calibration.of(gates, keys, self.first_query, self._own_windows))
        scale = math.log(h.price_high / h.price_low) / (prices["high"] - prices["low"])
        gates.weight2.mul_(scale)
        gates.bias2.mul_(scale).add_(math.log(h.price_high) - scale * prices["high"])

    @property
    def _own_windows(self) -> tuple[int | None, ...]:
        """The model's own sliding window in each layer."""
        return self.lm.architecture.sliding_windows

    def _prices(self, shares: dict[str, float], calibration: Calibration) -> dict[str, float]:
        """Return the prices, in the unit of the calibration's gates, that keep shares of the keys beyond the window."""
        h, tokens = self.hparams, calibration.tokens
        policy = HybridPolicy((LayerRule("all", "gated", h.ages[0]),), sinks=h.sinks)
        nothing = torch.zeros(1, tokens, 1)
        in_full = float(footprint(nothing, h.ages[:1], h.sinks, self.first_query, self._own_windows))
        kept = {name: in_full + share * (1 - in_full) for name, share in shares.items()}
        return {name: float(solve(policy, share, calibration).price) for name, share in kept.items()}  # type: ignore[arg-type]

    def _keys(self) -> list[list[Tensor]]:
        """Return the keys of the calibration windows, one `[1, kv_heads, tokens, head_dim]` per layer."""
        windows = self.trainer.datamodule.plan.of_split("train")[: self.hparams.calibration_windows]
        return [read_keys(self.lm.model, ids) for ids in windows]

    def gates(self) -> GateBank:
        """Return a copy of the current gates, for raw keys."""
        return self.bank.raw()

    def details(self) -> dict[str, Any]:
        """Return the details in the exported gates' config, with prices and layer shares of the calibration windows."""
        data: TokenWindows = self.trainer.datamodule
        h = self.hparams
        policy = HybridPolicy((LayerRule("all", "gated", h.ages[0]),), sinks=h.sinks, name="distilled")
        return {
            "target": TARGET,
            "ages": list(h.ages),
            "sinks": h.sinks,
            "inputs": "keys",
            "policy": policy.to_dict(),
            **solved_details(policy, Calibration.of(self.gates(), self._keys(), self.first_query, self._own_windows)),
            "training": {
                "backbone": h.backbone,
                "sources": data.plan.sources,
                "window": data.window,
                "windows": data.counts,
                "settings": {k: v for k, v in h.items() if not k.startswith("_")},
            },
        }

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the result, with the dtype that `auto` chose."""
        return super().settings() | {"dtype": str(self.lm.model.dtype).removeprefix("torch.")}

    # -- steps ----------------------------------------------------------------------------------------------------

    def temperature(self) -> float:
        """Return the temperature of this step."""
        start, end, steps = self.hparams.temperature, self.hparams.temperature_end, total_steps(self.trainer)
        share = self.global_step / max(1.0, steps - 1) if math.isfinite(steps) else 0.0
        return start * (end / start) ** min(1.0, share)

    def losses(
        self, ids: Tensor, price: float, places: Tensor, temperature: float | None, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute divergence and footprint of one window.

        Args:
            ids: int64 `[tokens]`.
            price: log of the price, whose unit is nats per token for the whole cache.
            places: int64 `[queries]`, positions of the scored queries.
            temperature: of the soft decision; None: keys are kept or evicted, as in the cache.
            teacher: last hidden states of these ids under a full cache; None: computed here.

        Returns:
            The mean divergence over the scored queries in nats per token, and the footprint; scalars.
        """
        h, kept = self.hparams, []

        def log_keep(layer: int, keys: Tensor) -> Tensor | None:
            if layer not in self.bank.layers:
                return None
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
        return lost, footprint(torch.cat(kept), h.ages, h.sinks, self.first_query, self._own_windows)

    @torch.no_grad()
    def full(self, ids: Tensor) -> Tensor:
        """Return the last hidden states under a full cache, `[tokens, hidden]`, of ids `[tokens]`."""
        return self.lm.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        """Return the mean loss over the windows of the batch, each at a random price."""
        low, high = math.log(self.hparams.price_low), math.log(self.hparams.price_high)
        temperature = self.temperature()
        total = self.bank.bank.bias2.sum() * 0  # a process without a window takes part in every step
        for number, ids in zip(batch.number.tolist(), batch.tokens, strict=True):
            # the draw depends on the step and the window, not on the number of processes
            generator = torch.Generator().manual_seed(self.global_step * 1_000_003 + number)
            price = low + (high - low) * float(torch.rand((), generator=generator))
            places = torch.arange(self.first_query, len(ids))
            if self.hparams.scored_tokens is not None:
                order = torch.randperm(len(places), generator=generator)
                places = places[order[: self.hparams.scored_tokens]].sort().values
            lost, kept = self.losses(ids, price, places.to(ids.device), temperature)
            total = total + lost + math.exp(price) * kept
            self.log_dict({"train_divergence": lost.detach(), "train_footprint": kept.detach()}, batch_size=1)
        # DDP averages gradients over processes; this factor turns that into the mean over the whole batch
        loss = total * self.trainer.world_size / batch.global_windows
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Log the divergence at three footprints, with keys kept or evicted as in the cache.

        Each window has prices of its own, which keep the shares `COMPARED` of it: at one price for all, gates that keep
        more would be compared with gates that keep less. `val_loss` is the mean of divergence × footprint, in which the
        three count about equally, as the divergence falls about as the footprint grows.
        """
        for ids in batch.tokens:
            places, total, keys = torch.arange(self.first_query, len(ids), device=ids.device), 0.0, []
            with hook_keys(self.lm.model, lambda _, layer_keys: keys.append(layer_keys)):  # noqa: B023
                teacher = self.full(ids)
            prices = self._prices(COMPARED, Calibration.of(self.gates(), [keys], self.first_query, self._own_windows))
            for name, price in prices.items():
                lost, kept = self.losses(ids, price, places, temperature=None, teacher=teacher)
                total += float(lost * kept) / len(prices)
                figures = {f"val_divergence/{name}": lost, f"val_footprint/{name}": kept}
                self.log_dict(figures, batch_size=1, sync_dist=True)
            self.log("val_loss", total, prog_bar=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return Adam with warm-up and cosine decay."""
        optimizer = torch.optim.Adam(self.bank.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.98))
        return warmup_then_cosine(optimizer, self.trainer, self.hparams.warmup_steps)
