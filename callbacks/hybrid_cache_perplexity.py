"""Perplexity of the LM under eviction by the gates as they stand, while they are trained."""

import time

import lightning as L
import torch
from torch import Tensor

from callbacks.head_dashboard import tensorboard_writer
from eval.common.footprint_figures import frontier
from lightning_modules.gates import LifespanGates
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.metrics.bootstrap import bootstrap, mean_over
from smartkv.metrics.perplexity import evicted_nll, full_cache_bytes, query_before, window_nll
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.named import named_policy, read_policy


class HybridCachePerplexity(L.Callback):
    """Measures at validations, with held-out windows of the harvest: the policy under the current gates at each
    footprint, beside a sliding window of equal footprint and the full cache.

    Logs `val_perplexity/…`, `val_delta_nll/…` (nats a token), `val_footprint/…` and `val_peak_bytes/…` of `full`,
    `window_0.22`, `all-gated_0.22` and so on, and a figure of the frontier. Windows are divided among processes.

    Args:
        footprints: shares of the full cache, each in (0, 1].
        policy: a named one (all-gated, default, lifespan) or a YAML file.
        windows: validation windows to measure, over all processes.
        calibration_windows: training windows on which the policy's open figures are solved.
        score_from: tokens of a window are scored from this one on; null: the second half.
        every_n_epochs: epochs between measurements. The first is at the end of epoch `every_n_epochs`.
        max_share: of the run's time so far; while earlier measurements have taken more, the next is left out. What the
            run ends with is always measured.
        dtype: of the LM; auto, float32, bfloat16 or float16.
        chunk: tokens of a text that go through the model together.
    """

    def __init__(
        self,
        footprints: tuple[float, ...] = (0.12, 0.22),
        policy: str = "all-gated",
        windows: int = 4,
        calibration_windows: int = 2,
        score_from: int | None = None,
        every_n_epochs: int = 4,
        max_share: float = 0.5,
        dtype: str = "auto",
        chunk: int = 1024,
    ) -> None:
        self.footprints, self.policy_name, self.windows = tuple(footprints), policy, windows
        self.calibration_windows, self.score_from = calibration_windows, score_from
        self.every_n_epochs, self.max_share, self.dtype, self.chunk = every_n_epochs, max_share, dtype, chunk
        self.lm: Backbone | None = None
        self.started = self.spent = 0.0
        self.measured_step = -1

    # -- when -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: LifespanGates, stage: str) -> None:
        """Everything that can be wrong is told here, before the LM is loaded."""
        if min(self.windows, self.calibration_windows, self.every_n_epochs, self.chunk) < 1:
            raise SmartKVError("windows, calibration_windows, every_n_epochs and chunk must be at least 1")
        if not self.footprints or not all(0 < f <= 1 for f in self.footprints):
            raise SmartKVError(f"footprints are shares of the full cache in (0, 1], got {list(self.footprints)}")
        if not 0 <= self.max_share <= 1:
            raise SmartKVError(f"max_share is a share of the run's time from 0 to 1, got {self.max_share}")
        rows = trainer.datamodule.rows
        window, fingerprint = rows.manifest.window, rows.manifest.fingerprint
        self.first_token = window // 2 if self.score_from is None else self.score_from
        if not 1 <= self.first_token < window:
            raise SmartKVError(
                f"score_from must be at least 1 and below the window of {window} tokens, got {self.first_token}"
            )
        self.policy = read_policy(self.policy_name, fingerprint.layers)
        with torch.device("meta"):  # gates to come: no weights yet, and no random numbers drawn before the module's
            self.policy.check(fingerprint, GateBank(fingerprint, rows.layers, details={"inputs": rows.inputs}))
        if self.policy.open is None:
            raise SmartKVError(f"policy '{self.policy_name}' leaves nothing open that a footprint could decide")
        plan = trainer.datamodule.plan
        self.held_out, self.learn = (
            plan.of_split(split)[:count]
            for split, count in (("validation", self.windows), ("train", self.calibration_windows))
        )
        self.started = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        if fitting and ((trainer.current_epoch + 1) % self.every_n_epochs or not self._affordable(trainer)):
            return
        pl_module.log_dict(self._measure(trainer, pl_module), sync_dist=True)  # the same on every process

    def on_train_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """What the run ends with. The module can log no more, so it goes straight to the loggers."""
        if trainer.fast_dev_run or self.measured_step == trainer.global_step:
            return
        figures = self._measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(figures, trainer.global_step)

    def _affordable(self, trainer: L.Trainer) -> bool:
        """Decided by one process for all."""
        within = self.spent <= self.max_share * (time.monotonic() - self.started)
        return bool(trainer.strategy.broadcast(within))

    # -- what ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: LifespanGates) -> dict[str, float]:
        start = time.monotonic()
        if self.lm is None:
            self._prepare(trainer, pl_module)
        gates = pl_module.gates().to(pl_module.device).eval()
        calibration = Calibration.of(gates, self.keys, query_before(self.first_token))
        measured = {"full": self.full, **self.reference}
        for footprint in self.footprints:
            try:
                policy = solve(self.policy, footprint, calibration)
            except FootprintOutOfReach:  # gates of an early epoch may not be able to keep that little, or that much
                continue
            measured[f"{policy.name}_{footprint:g}"] = self._windows(trainer, gates, policy)
        self._draw(trainer, measured)
        self.measured_step = trainer.global_step
        self.spent += time.monotonic() - start
        return self._figures(measured)

    def _prepare(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """What the gates do not change: the LM, its keys of the calibration windows, full cache and sliding window."""
        manifest = trainer.datamodule.rows.manifest
        self.lm = load_backbone(manifest.arguments["backbone"], self.dtype, pl_module.device)
        self.keys = [read_keys(self.lm.model, window) for window in self.learn]
        self.full = self._windows(trainer, None, None)
        tokens, layers = self.held_out.shape[1], manifest.fingerprint.layers
        calibration = Calibration.without_gates(layers, tokens, query_before(self.first_token))
        self.reference = {}
        for footprint in self.footprints:
            policy = solve(named_policy("window", layers), footprint, calibration)
            self.reference[f"window_{footprint:g}"] = self._windows(trainer, None, policy)

    def _windows(self, trainer: L.Trainer, gates: GateBank | None, policy: HybridPolicy | None) -> Tensor:
        """NLL, footprint and peak bytes of every window, float64 `[windows, 3]`, the same on every process.

        Each window is measured by one process and added to the others' zeros, so the sum is exact.
        """
        model, rank, world = self.lm.model, trainer.global_rank, trainer.world_size
        found = torch.zeros(len(self.held_out), 3, dtype=torch.float64, device=model.device)
        for number in range(rank, len(self.held_out), world):
            tokens = self.held_out[number]
            if policy is None:
                row = (window_nll(model, tokens, self.first_token), 1.0, full_cache_bytes(model, len(tokens) - 1))
            else:
                own = evicted_nll(model, gates if policy.gated else None, policy, tokens, self.first_token, self.chunk)
                row = (own.nll, float(own.footprint.mean()), own.peak_bytes)
            found[number] = torch.tensor(row, dtype=torch.float64)
        return trainer.strategy.reduce(found, reduce_op="sum").cpu()

    def _figures(self, measured: dict[str, Tensor]) -> dict[str, float]:
        figures = {}
        full = measured["full"][:, 0].mean()
        for name, rows in measured.items():
            nll, footprint = rows[:, 0].mean(), rows[:, 1].mean()
            figures[f"val_perplexity/{name}"] = float(nll.exp())
            figures[f"val_peak_bytes/{name}"] = float(rows[:, 2].max())
            if name != "full":
                figures[f"val_delta_nll/{name}"] = float(nll - full)
                figures[f"val_footprint/{name}"] = float(footprint)
        return figures

    def _draw(self, trainer: L.Trainer, measured: dict[str, Tensor]) -> None:
        writer = tensorboard_writer(trainer)
        if writer is None or not trainer.is_global_zero:
            return
        series: dict[str, list[tuple[float, float, float, float]]] = {}
        for name, rows in measured.items():
            if name != "full":
                delta = rows[:, 0] - measured["full"][:, 0]
                interval = bootstrap(len(delta), lambda weight, delta=delta: mean_over(weight, delta))
                point = (float(rows[:, 1].mean()), float(delta.mean()), *interval)
                series.setdefault(name.rpartition("_")[0], []).append(point)
        title = f"{len(self.held_out)} validation windows of {self.held_out.shape[1]:,} tokens"
        writer.add_figure("eviction/frontier", frontier(series, title), trainer.global_step)
