"""Settings of contenders for a footprint, remembered between runs because solving a price takes a calibration."""

from typing import Any

from eval.common.resume import Measurements
from eval.contenders.base import Contender
from eval.contenders.policies import PolicyContender


def solved_setting(
    cells: Measurements, contender: Contender, footprint: float, weights: dict[str, str], learnt_on: Any
) -> Any:
    """Return the setting of a contender for a footprint; see `Contender.solved`.

    Args:
        cells: measured figures of the run; the setting of a policy is remembered among them.
        contender: any contender.
        footprint: share of the full cache.
        weights: digests of the gates; empty without gates.
        learnt_on: digests of the calibration texts, fit for JSON.

    Raises:
        FootprintOutOfReach: no setting keeps that share.
    """
    if not isinstance(contender, PolicyContender):
        return contender.solved(footprint)
    learned = weights if contender.policy.gated else {}
    key = ["solved", contender.policy.to_dict(), footprint, learned, learnt_on]
    return cells.measured(key, lambda: contender.solved(footprint))
