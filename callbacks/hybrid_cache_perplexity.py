"""Perplexity of the LM under eviction by the gates that are being trained."""

import time
from dataclasses import replace
from functools import partial
from itertools import product

import lightning as L
import torch
from torch import Tensor

from callbacks.tensorboard_logging import logged_step, tensorboard_writer
from datamodules.lifespan_shards import LifespanShards
from datamodules.online_keys import OnlineKeys
from eval.common.footprint_figures import Point, frontier
from lightning_modules.gates import LifespanGates
from smartkv.cache.arguments import own_policy
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.metrics.bootstrap import bootstrap, mean_over
from smartkv.metrics.perplexity import evicted_nll, full_cache_bytes, query_before, window_nll
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.named import named_policy, read_policy
from smartkv.policies.planned_budget import shares_at

BUDGET = "gates@budget"  # the policy whose price floats; `eval compare` has the same name for it


def _named(name: str, layers: int) -> HybridPolicy:
    """Return a policy by its name or file."""
    return replace(own_policy(None), name=BUDGET) if name == BUDGET else read_policy(name, layers)


def _always_kept() -> int:
    """Return how many keys a head the floating price never lets go: sinks and the latest ones."""
    policy = own_policy(None)
    return policy.sinks + max(rule.window or 1 for rule in policy.rules)


class HybridCachePerplexity(L.Callback):
    """Callback that measures, after a validation, what eviction by the current gates costs.

    The frozen LM reads held-out windows of the harvest under the policy at each footprint, under a sliding window of
    equal footprint, and with a full cache. The callback logs `val_perplexity/…`, `val_delta_nll/…` (nats a token),
    `val_footprint/…` (keys that scored queries saw), `val_held/…` (keys held at the end) and `val_peak_bytes/…` of
    `full`, `window_0.22`, `all-gated_0.22` and so on, where the figure is what was asked for, and draws
    `eviction/frontier`. Windows are divided among processes.

    Args:
        footprints: shares of the full cache, each in (0, 1].
        policy: a named one (all-gated, default, lifespan), a YAML file, or gates@budget: gates in all layers, and a
            price that floats so that the footprint is held; or a list of them, each of which is measured.
        windows: validation windows to measure, over all processes.
        calibration_windows: training windows on which the policy's open figures are solved.
        score_from: first token of a window that is scored. Null: the middle one.
        every_n_epochs: epochs between measurements. The first is at the end of epoch `every_n_epochs`.
        max_share: share of the run's time that measurements may take, from 0 to 1. While earlier ones have taken more,
            the next is left out. The gates at the end of the run are always measured.
        dtype: of the LM; auto, float32, bfloat16 or float16.
        chunk: tokens of a text that go through the model together.
    """

    def __init__(
        self,
        footprints: tuple[float, ...] = (0.12, 0.22),
        policy: str | list[str] = "all-gated",
        windows: int = 4,
        calibration_windows: int = 2,
        score_from: int | None = None,
        every_n_epochs: int = 4,
        max_share: float = 0.5,
        dtype: str = "auto",
        chunk: int = 1024,
    ) -> None:
        """Keep the settings; `setup` checks them."""
        self.footprints, self.windows = tuple(footprints), windows
        self.policy_names = [policy] if isinstance(policy, str) else list(policy)
        self.calibration_windows, self.score_from = calibration_windows, score_from
        self.every_n_epochs, self.max_share, self.dtype, self.chunk = every_n_epochs, max_share, dtype, chunk
        self.lm: Backbone | None = None
        self.started = self.spent = 0.0
        self.measured_step = -1

    # -- schedule -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: LifespanGates, stage: str) -> None:
        """Check every setting before the LM is loaded, and choose the windows.

        Raises:
            SmartKVError: a setting is out of range, or the policy does not fit the gates or the footprints.
        """
        if min(self.windows, self.calibration_windows, self.every_n_epochs, self.chunk) < 1:
            raise SmartKVError("windows, calibration_windows, every_n_epochs and chunk must be at least 1")
        if not self.footprints or not all(0 < f <= 1 for f in self.footprints):
            raise SmartKVError(f"footprints are shares of the full cache in (0, 1], got {list(self.footprints)}")
        if not 0 <= self.max_share <= 1:
            raise SmartKVError(f"max_share is a share of the run's time from 0 to 1, got {self.max_share}")
        data: LifespanShards | OnlineKeys = trainer.datamodule  # type: ignore[attr-defined]
        rows = data.rows
        window, fingerprint = rows.manifest.window, rows.manifest.fingerprint
        self.first_token = window // 2 if self.score_from is None else self.score_from
        if not 1 <= self.first_token < window:
            raise SmartKVError(
                f"score_from must be at least 1 and below the window of {window} tokens, got {self.first_token}"
            )
        self.policies = [_named(name, fingerprint.layers) for name in self.policy_names]
        names = [policy.name for policy in self.policies]
        if not names or len(set(names)) < len(names):
            raise SmartKVError(f"policy must be one policy, or a list of policies with different names, got {names}")
        if BUDGET in names and (least := _always_kept()) > min(self.footprints) * (window - 1):
            raise SmartKVError(
                f"{BUDGET} always keeps {least} keys a head, more than a footprint of {min(self.footprints):g} of "
                f"windows of {window} tokens: give larger footprints"
            )
        with torch.device("meta"):  # the gates of the run, without weights, so that no random numbers are drawn here
            gates = GateBank(fingerprint, rows.layers, details={"inputs": rows.inputs})
        for policy in self.policies:
            policy.check(fingerprint, gates, rows.manifest.sliding_windows)
            if policy.open is None:
                raise SmartKVError(
                    f"policy '{policy.name}' leaves nothing open that a footprint could decide: "
                    "leave out its price or its window"
                )
        plan = data.plan
        self.held_out = plan.of_split("validation")[: self.windows]
        self.learn = plan.of_split("train")[: self.calibration_windows]
        self.started = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Measure, every `every_n_epochs` epochs, if the time allows it."""
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        if fitting and ((trainer.current_epoch + 1) % self.every_n_epochs or not self._affordable(trainer)):
            return
        pl_module.log_dict(self._measure(trainer, pl_module), sync_dist=True)  # the same on every process

    def on_train_end(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Measure the gates at the end of the run, and hand the figures to the loggers: the module can log no more."""
        short = trainer.fast_dev_run  # type: ignore[attr-defined]
        if short or self.measured_step == trainer.global_step:
            return
        figures = self._measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(figures, logged_step(trainer))

    def _affordable(self, trainer: L.Trainer) -> bool:
        """Return whether the time allows a measurement; one process decides for all."""
        within = self.spent <= self.max_share * (time.monotonic() - self.started)
        return bool(trainer.strategy.broadcast(within))

    # -- measurement --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: LifespanGates) -> dict[str, float]:
        start = time.monotonic()
        if self.lm is None:
            self._prepare(trainer, pl_module)
        gates = pl_module.gates().to(pl_module.device).eval()
        own = trainer.datamodule.rows.manifest.sliding_windows  # type: ignore[attr-defined]
        calibration = Calibration.of(gates, self.keys, query_before(self.first_token), own)
        measured = {"full": self.full, **self.reference}
        for policy, footprint in product(self.policies, self.footprints):
            budget, solved = footprint if policy.name == BUDGET else None, policy
            try:
                if budget is None:
                    solved = solve(policy, footprint, calibration)
                elif shares := shares_at(policy, [footprint], calibration):
                    gates.details = gates.details | {"layer_shares": shares}
                else:
                    continue
            except FootprintOutOfReach:  # the gates of an early epoch may have no price for so much or so little
                continue
            measured[f"{policy.name}_{footprint:g}"] = self._windows(trainer, gates, solved, budget)
        self._draw(trainer, measured)
        self.measured_step = trainer.global_step
        self.spent += time.monotonic() - start
        return self._figures(measured)

    def _prepare(self, trainer: L.Trainer, pl_module: LifespanGates) -> None:
        """Load the LM and measure what does not depend on the gates: the full cache and the sliding window."""
        manifest = trainer.datamodule.rows.manifest  # type: ignore[attr-defined]
        self.lm = load_backbone(manifest.arguments["backbone"], self.dtype, pl_module.device)
        self.keys = [read_keys(self.lm.model, window) for window in self.learn]
        self.full = self._windows(trainer, None, None)
        tokens, layers = self.held_out.shape[1], manifest.fingerprint.layers
        own = manifest.sliding_windows
        calibration = Calibration.without_gates(layers, tokens, query_before(self.first_token), own)
        self.reference = {}
        for footprint in self.footprints:
            policy = solve(named_policy("window", layers), footprint, calibration)
            self.reference[f"window_{footprint:g}"] = self._windows(trainer, None, policy)

    def _windows(
        self, trainer: L.Trainer, gates: GateBank | None, policy: HybridPolicy | None, budget: float | None = None
    ) -> Tensor:
        """Return NLL, footprint, peak bytes and held keys of every window, float64 `[windows, 4]`.

        It is the same on every process.

        Each window is measured by one process and added to the others' zeros, so the sum is exact.
        """
        assert self.lm is not None, "_prepare loads the model"
        model, rank, world = self.lm.model, trainer.global_rank, trainer.world_size
        rows = torch.zeros(len(self.held_out), 4, dtype=torch.float64, device=model.device)
        for number in range(rank, len(self.held_out), world):
            tokens = self.held_out[number]
            if policy is None:
                full = window_nll(model, tokens, self.first_token)
                row = (full, 1.0, full_cache_bytes(model, len(tokens) - 1), 1.0)
            else:
                bank = gates if policy.gated else None
                window = evicted_nll(model, bank, policy, tokens, self.first_token, self.chunk, budget)
                row = (window.nll, window.overall, window.peak_bytes, window.held or 0.0)
            rows[number] = torch.tensor(row, dtype=torch.float64)
        return trainer.strategy.reduce(rows, reduce_op="sum").cpu()

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
                figures[f"val_held/{name}"] = float(rows[:, 3].mean())
        return figures

    def _draw(self, trainer: L.Trainer, measured: dict[str, Tensor]) -> None:
        writer = tensorboard_writer(trainer)
        if writer is None or not trainer.is_global_zero:
            return
        series: dict[str, list[Point]] = {}
        for name, rows in measured.items():
            if name != "full":
                delta = rows[:, 0] - measured["full"][:, 0]
                interval = bootstrap(len(delta), partial(mean_over, values=delta))
                point = (float(rows[:, 1].mean()), float(delta.mean()), *interval)
                series.setdefault(name.rpartition("_")[0], []).append(point)
        title = f"{len(self.held_out)} validation windows of {self.held_out.shape[1]:,} tokens"
        writer.add_figure("eviction/frontier", frontier(series, title), logged_step(trainer))
