"""Frontiers: the loss of each policy by footprint, and its footprint relative to the sliding window's at equal loss."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor

from eval.common.results import read_result
from smartkv.errors import SmartKVError
from smartkv.metrics.bootstrap import bootstrap, mean_over
from smartkv.metrics.perplexity import EvictedWindow
from smartkv.policies.hybrid import HybridPolicy

REFERENCE = "window"  # the policy that others are compared with


@dataclass(frozen=True)
class Point:
    """One policy at one footprint, over some windows.

    Attributes:
        policy: name of the policy.
        target: footprint that was asked for; None: the policy leaves nothing open.
        footprint: measured footprint, over the queries whose next token is scored.
        delta_nll: NLL minus the full cache's, nats a token.
        interval: of `delta_nll`, 95 %, bootstrap over windows.
        perplexity: `exp` of the mean NLL.
        peak_bytes: largest of the windows.
        peak_bytes_full: bytes of a full cache.
        footprint_by_head: `[layers][kv_heads]`.
        delta_nll_window: `delta_nll` of each window.
        settings: the policy as it was used.
        held: keys held when the window was read ÷ those of a full cache, mean over windows; None: not measured.
    """

    policy: str
    target: float | None
    footprint: float
    delta_nll: float
    interval: tuple[float, float]
    perplexity: float
    peak_bytes: int
    peak_bytes_full: int
    footprint_by_head: list[list[float]]
    delta_nll_window: list[float]
    settings: dict[str, Any]
    held: float | None = None

    @classmethod
    def of(
        cls,
        policy: HybridPolicy,
        target: float | None,
        full: list[float],
        windows: list[EvictedWindow],
        full_bytes: int,
    ) -> "Point":
        """Make a point from the windows that were read.

        Args:
            policy: as it was used.
            target: footprint that was asked for; None: nothing was left open.
            full: NLL of each window under the full cache, nats a token.
            windows: figures of each window under the policy.
            full_bytes: bytes of a full cache.
        """
        nll = torch.tensor([window.nll for window in windows], dtype=torch.float64)
        delta = nll - torch.tensor(full, dtype=torch.float64)
        heads = torch.stack([window.footprint for window in windows]).mean(dim=0)
        return cls(
            policy.name,
            target,
            sum(window.overall for window in windows) / len(windows),
            float(delta.mean()),
            bootstrap(len(delta), lambda weight: mean_over(weight, delta)),
            math.exp(float(nll.mean())),
            max(window.peak_bytes for window in windows),
            full_bytes,
            heads.tolist(),
            delta.tolist(),
            policy.to_dict(),
            None if windows[0].held is None else sum(window.held or 0 for window in windows) / len(windows),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, fit for JSON."""
        return asdict(self)


def read_points(folder: Path) -> list[Point]:
    """Read the points that `eval perplexity` wrote into a folder; none where it was not run.

    Raises:
        SmartKVError: the file exists and is not one that `eval perplexity` writes.
    """
    path = folder / "perplexity.json"
    if not path.exists():
        return []
    names = [field.name for field in fields(Point)]
    try:
        return [Point(**{name: row[name] for name in names if name in row}) for row in read_result(path)["frontier"]]
    except (KeyError, TypeError) as error:
        raise SmartKVError(f"{path} is not what `eval perplexity` writes ({error}): run it again") from error


def summary_line(points: list[Point]) -> str:
    """Return a line for each policy and footprint that tells what it saves beside the sliding window."""
    reference = [point for point in points if point.policy == REFERENCE]
    lines = []
    for point in points:
        ratio = None if point.policy == REFERENCE else equal_loss_ratio(point, reference)
        head = (
            f"{point.policy} keeps {point.footprint:.0%} of the keys and loses {point.delta_nll:.3f} nats a token; "
            f"peak {point.peak_bytes / 2**20:.1f} MiB instead of {point.peak_bytes_full / 2**20:.1f}"
        )
        best = min(reference, key=lambda p: p.delta_nll, default=None)
        if ratio:
            lines.append(f"{head}; a sliding window needs {point.footprint / ratio[0]:.0%} to lose as little")
        elif best is not None and point.policy != REFERENCE and best.delta_nll > point.delta_nll:
            lines.append(f"{head}; a sliding window of {best.footprint:.0%} still loses {best.delta_nll:.3f}")
    return "\n".join(lines) or "no policy lost as much, or as little, as the sliding window at any of its footprints"


class OnFrontier(Protocol):
    """A footprint and the loss at it."""

    @property
    def footprint(self) -> float:
        """Share of the full cache's keys."""

    @property
    def delta_nll(self) -> float:
        """NLL minus the full cache's, nats a token, mean over windows."""

    @property
    def delta_nll_window(self) -> list[float]:
        """The same of each window."""


def equal_loss_ratio(
    point: OnFrontier, reference: Sequence[OnFrontier], groups: Sequence[int] | None = None
) -> tuple[float, tuple[float, float]] | None:
    """Return a point's footprint ÷ the footprint at which a reference loses as much.

    Between two of its points the reference is a straight line in log footprint and log ΔNLL.

    Args:
        point: any point.
        reference: points of the reference.
        groups: group of each window, such as its document, as `bootstrap` takes them.

    Returns:
        The ratio and its interval (95 %, bootstrap over windows or groups); None: the reference's points do not reach
        that loss.
    """
    curve = sorted(reference, key=lambda p: p.footprint)
    if len(curve) < 2:
        return None
    log_footprint = torch.tensor([p.footprint for p in curve], dtype=torch.float64).log()
    losses = torch.tensor([p.delta_nll_window for p in curve], dtype=torch.float64)  # [points, windows]
    own = torch.tensor(point.delta_nll_window, dtype=torch.float64)

    def ratio(weight: Tensor) -> Tensor:
        curve_loss = torch.stack([mean_over(weight, row) for row in losses])  # [points, draws]
        return point.footprint / _footprint_at(curve_loss, mean_over(weight, own), log_footprint)

    middle = float(ratio(torch.ones(1, len(own), dtype=torch.float64)))
    if math.isnan(middle):
        return None
    return middle, bootstrap(len(own), ratio, groups=groups)


def loss_at(footprint: float, curve: Sequence[OnFrontier]) -> float | None:
    """Return the ΔNLL of a curve at a footprint, nats a token; None: the footprint is beyond its points.

    Between two points the curve is a straight line in log footprint and log ΔNLL.
    """
    points = sorted((p.footprint, max(p.delta_nll, 1e-9)) for p in curve)
    for (left, high), (right, low) in pairwise(points):
        if left <= footprint <= right:
            share = (math.log(footprint) - math.log(left)) / (math.log(right) - math.log(left))
            return math.exp(math.log(high) + share * (math.log(low) - math.log(high)))
    return None


def _footprint_at(curve_loss: Tensor, loss: Tensor, log_footprint: Tensor) -> Tensor:
    """Return the footprints at which a curve has a loss, `[draws]`; NaN: the curve does not reach it.

    Args:
        curve_loss: `[points, draws]`.
        loss: `[draws]`.
        log_footprint: `[points]`, ascending.
    """
    footprints = torch.full_like(loss, torch.nan)
    log_curve, log_loss = curve_loss.clamp(min=1e-9).log(), loss.clamp(min=1e-9).log()
    for left in range(len(log_footprint) - 1):
        high, low = log_curve[left], log_curve[left + 1]
        inside = (log_loss <= high) & (log_loss >= low) & footprints.isnan() & (high > low)
        share = (high - log_loss) / (high - low)
        here = (log_footprint[left] + share * (log_footprint[left + 1] - log_footprint[left])).exp()
        footprints = torch.where(inside, here, footprints)
    return footprints


def frontier_table(points: list[Point], title: str) -> Table:
    """Make a table of points, a section for each policy."""
    table = Table(title=title)
    columns = (
        "policy",
        "asked",
        "footprint",
        "held",
        "ΔNLL (95 %)",
        "perplexity",
        "peak KV",
        "of full",
        f"÷ {REFERENCE}'s (95 %)",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    reference = [point for point in points if point.policy == REFERENCE]
    for number, point in enumerate(points):
        if number and point.policy != points[number - 1].policy:
            table.add_section()
        ratio = None if point.policy == REFERENCE else equal_loss_ratio(point, reference)
        table.add_row(
            point.policy,
            "" if point.target is None else f"{point.target:g}",
            f"{point.footprint:.3f}",
            "" if point.held is None else f"{point.held:.3f}",
            f"{point.delta_nll:+.3f} ({point.interval[0]:+.3f} to {point.interval[1]:+.3f})",
            f"{point.perplexity:.2f}",
            f"{point.peak_bytes / 2**20:.1f} MiB",
            f"{point.peak_bytes / point.peak_bytes_full:.0%}",
            "" if ratio is None else f"{ratio[0]:.2f} ({ratio[1][0]:.2f} to {ratio[1][1]:.2f})",
        )
    table.caption = (
        "Footprint: keys that scored queries saw ÷ a full cache's; held: the same of the keys at the end. "
        "ΔNLL: nats a token above the full cache. "
        f"÷ {REFERENCE}'s: footprint over the {REFERENCE}'s at equal ΔNLL, where it was measured."
    )
    return table
