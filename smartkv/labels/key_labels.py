"""Labels of a batch of keys, as objectives read them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Labels(NamedTuple):
    """Labels of some keys of all gates.

    Attributes:
        log4_lifespan: float32 `[gates, rows]`, capped at the follow-up.
        future_attention: float32 `[ages, gates, rows]`, mean probability from each age on; None: not harvested.
        ages: tokens, of `future_attention`.
    """

    log4_lifespan: Tensor
    future_attention: Tensor | None = None
    ages: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Labels":
        """The same on another device."""
        future = None if self.future_attention is None else self.future_attention.to(device, non_blocking=True)
        return Labels(self.log4_lifespan.to(device, non_blocking=True), future, self.ages)
