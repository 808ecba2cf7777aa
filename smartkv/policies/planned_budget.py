"""A budget of keys or bytes that a user plans, and its division among the layers of a model."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.checks import describe
from smartkv.policies.budgets import Calibration, solve
from smartkv.policies.figures import check_tokens
from smartkv.policies.hybrid import HybridPolicy

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes that is given as a number or as a text such as "200MB" or "1.5 GiB".

    Raises:
        SmartKVError: it is neither, or not above 0.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", size) if isinstance(size, str) else None
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found and found[2].lower() in units:
        count = int(float(found[1]) * units[found[2].lower()])
    elif type(size) is int:
        count = size
    else:
        count = 0
    if count < 1:
        raise SmartKVError(
            f"max_bytes must be a number of bytes above 0, or a text such as '200MB' ({', '.join(UNITS)}), "
            f"got {describe(size)}"
        )
    return count


@dataclass(frozen=True)
class Budget:
    """What a cache may hold. Exactly one of the first three figures is given.

    Attributes:
        max_tokens: keys a KV head may hold, mean over all heads of all layers.
        max_bytes: bytes that all rows together may hold.
        footprint: share of a full cache's keys at the planned length.
        plan: planned length in tokens, prompt and answer; None: known at the first call.
    """

    max_tokens: int | None = None
    max_bytes: int | None = None
    footprint: float | None = None
    plan: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_tokens("max_tokens", self.max_tokens, least=1, unit="keys")
        if self.plan is not None:
            check_tokens("plan", self.plan, least=1)

    @property
    def argument(self) -> str:
        """Name of the figure that is given."""
        return str(self).partition("=")[0]

    def __str__(self) -> str:
        if self.max_tokens is not None:
            return f"max_tokens={self.max_tokens}"
        return f"footprint={self.footprint:g}" if self.max_bytes is None else f"max_bytes={self.max_bytes:,}"


def layer_weights(gates: GateBank | None, footprint: float, layers: int) -> list[float]:
    """Return what each layer keeps of its own full cache at one price, as the gates remember it.

    Args:
        gates: their details may hold `layer_shares` (see `smartkv.policies.budgets.solved_details`).
        footprint: for which the shares are wanted; the remembered one that is nearest decides.
        layers: number of layers of the model.

    Returns:
        One number per layer; all equal where the gates remember none.
    """
    remembered: list[Any] = gates.details.get("layer_shares", []) if gates is not None else []
    remembered = [(share, weights) for share, weights in remembered if len(weights) == layers]
    if not remembered:
        return [1.0] * layers
    return [max(share, 1e-6) for share in min(remembered, key=lambda entry: abs(math.log(entry[0] / footprint)))[1]]


def shares_at(policy: HybridPolicy, footprints: Sequence[float], calibration: Calibration) -> list[list[Any]]:
    """Return what each layer keeps of its own full cache where one price keeps a footprint of the model's.

    Args:
        policy: its price is open.
        footprints: shares of the full cache.
        calibration: on which the price of each is solved.

    Returns:
        [footprint, shares] of each that is in reach: `layer_shares` as gates remember them.
    """
    shares: list[list[Any]] = []
    for footprint in footprints:
        try:
            solved = solve(policy, footprint, calibration)
        except FootprintOutOfReach:
            continue
        shares.append([footprint, calibration.layer_shares(solved)])
    return shares


def divide(total: int, weights: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Divide a budget among layers in proportion to `weights`, within bounds.

    Args:
        total: number of keys, at least the sum of `least`.
        weights: of the layers, above 0.
        least, most: bounds of each layer's share.

    Returns:
        Keys of each layer. Their sum is `total`, or the sum of `most` if that is less.
    """
    total = min(total, sum(most))

    def shares(scale: float) -> list[float]:
        return [min(max(scale * weight, low), high) for weight, low, high in zip(weights, least, most, strict=True)]

    small, large = 0.0, max(high / weight for weight, high in zip(weights, most, strict=True))
    for _ in range(100):
        middle = (small + large) / 2
        small, large = (middle, large) if sum(shares(middle)) <= total else (small, middle)
    exact = shares(small)
    whole = [math.floor(share + 1e-6) for share in exact]
    by_rest = sorted(range(len(whole)), key=lambda layer: whole[layer] - exact[layer])
    for layer in [each for each in by_rest if whole[each] < most[each]][: total - sum(whole)]:
        whole[layer] += 1
    return whole
