"""A contender's setting for a footprint, kept among a command's figures: a price takes a calibration to solve."""

from typing import Any

from eval.common.resume import Measurements
from eval.contenders.base import Contender
from eval.contenders.policies import PolicyContender


def solved_setting(
    cells: Measurements, contender: Contender, footprint: float, weights: dict[str, str], learnt_on: Any
) -> Any:
    """What `contender` is to be set to for a footprint, see `Contender.solved`.

    Args:
        cells: figures of the run; a policy's setting is one of them.
        weights: digests of the gates, if there are some.
        learnt_on: the texts of the calibration, for JSON.
    """
    if not isinstance(contender, PolicyContender):
        return contender.solved(footprint)
    learned = weights if contender.policy.gated else {}
    key = ["solved", contender.policy.to_dict(), footprint, learned, learnt_on]
    return cells.measured(key, lambda: contender.solved(footprint))
