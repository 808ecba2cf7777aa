"""Labels of a batch of keys, in the form that objectives take."""

from typing import NamedTuple

import torch
from torch import Tensor


class Labels(NamedTuple):
    """Labels of a batch of keys, for every gate.

    Attributes:
        log4_lifespan: Base-4 logarithm of the lifespan, capped at the follow-up: float32 `[gates, rows]`.
        future_attention: Future attention from each age on: float32 `[ages, gates, rows]`. None if not harvested.
        ages: Ages of `future_attention`, in tokens.
    """

    log4_lifespan: Tensor
    future_attention: Tensor | None = None
    ages: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Labels":
        """Return the labels on another device."""
        future = None if self.future_attention is None else self.future_attention.to(device, non_blocking=True)
        return Labels(self.log4_lifespan.to(device, non_blocking=True), future, self.ages)
