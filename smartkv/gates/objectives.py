"""What gates are trained to predict of a key: one small class each.

An objective makes targets from a key's labels, a loss for each row, and from the gates' outputs the one figure that a
policy compares with its price: larger stays longer. Distillation, which needs the model itself, is in
`smartkv.distillation.kl_divergence`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.errors import SmartKVError
from smartkv.io.class_names import Persisted
from smartkv.labels.key_labels import Labels


class Objective(Persisted, ABC):
    """What all objectives have.

    Attributes:
        outputs: of a gate.
        target: what the exported gates' config calls it.
        settings: what `objective_of_target` needs to know besides.
        in_log4: whether the score estimates log4 lifespan, so that it has an R².
    """

    outputs, in_log4 = 1, False
    target: str
    settings: dict[str, Any]

    def targets(self, labels: Labels) -> Tensor:
        """float32 `[gates, rows, outputs]`."""
        return labels.log4_lifespan[..., None]

    def start(self, mean: Tensor) -> Tensor:
        """Biases of the outputs at the start, from the mean of each target; both `[gates, outputs]`."""
        return mean

    @abstractmethod
    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Both `[gates, rows, outputs]` -> `[gates, rows]`, not reduced."""

    def score(self, prediction: Tensor) -> Tensor:
        """`[…, outputs]` -> `[…]`: the larger, the longer a key stays."""
        return prediction[..., 0]


class Log4Lifespan(Objective):
    """Regression of log4 lifespan (DESIGN's definition): its mean, or between mean and median.

    Args:
        loss: huber or mse.
        huber_delta: where Huber turns from square to linear, in units of log4 (factors of 4).

    Raises:
        SmartKVError: an unknown loss, or a delta of 0 or less.
    """

    target, in_log4 = "log4 lifespan", True

    def __init__(self, loss: Literal["huber", "mse"] = "huber", huber_delta: float = 1.0) -> None:
        if loss not in ("huber", "mse"):
            raise SmartKVError(f"loss must be huber or mse, got {loss!r}")
        if huber_delta <= 0:
            raise SmartKVError(f"huber_delta must be above 0, got {huber_delta}")
        self.loss, self.huber_delta, self.settings = loss, huber_delta, {}
        self.arguments = {"loss": loss, "huber_delta": huber_delta}

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.loss == "mse":
            return F.mse_loss(prediction, target, reduction="none")[..., 0]
        return F.huber_loss(prediction, target, reduction="none", delta=self.huber_delta)[..., 0]


class OrdinalAges(Objective):
    """Whether a key is still looked at after each of some ages: a logit an age, by cross-entropy.

    The score is the mean log4 lifespan that these probabilities imply, a life between two ages counted as the younger.

    Args:
        ages: tokens, ascending, each below the follow-up.

    Raises:
        SmartKVError: no ages, or not ascending from 1 on.
    """

    target, in_log4 = "life beyond ages", True

    def __init__(self, ages: Sequence[int] = (4, 16, 64, 256)) -> None:
        if not ages or list(ages) != sorted(set(ages)) or min(ages) < 1:
            raise SmartKVError(f"ages must be ascending numbers of tokens from 1 on, got {list(ages)}")
        self.ages, self.outputs = tuple(ages), len(ages)
        self.arguments = self.settings = {"ages": list(ages)}

    def _log4_ages(self, like: Tensor) -> Tensor:
        return torch.tensor(self.ages, dtype=torch.float64, device=like.device).log2() / 2

    def targets(self, labels: Labels) -> Tensor:
        life = labels.log4_lifespan[..., None].double()
        return (life > self._log4_ages(life) + 1e-6).float()

    def start(self, mean: Tensor) -> Tensor:
        return mean.clamp(1e-4, 1 - 1e-4).logit()

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(prediction, target, reduction="none").sum(dim=-1)

    def score(self, prediction: Tensor) -> Tensor:
        steps = self._log4_ages(prediction).diff(prepend=torch.zeros(1, dtype=torch.float64, device=prediction.device))
        return (prediction.sigmoid() * steps.to(prediction.dtype)).sum(dim=-1)


class FutureAttention(Objective):
    """Log of the mean attention that a key will get from each of the harvested ages on.

    The loss `exp(p) − m·p` (a Poisson likelihood) is least where `exp(p)` is the mean of `m`, zeros included: a
    regression of `log m` would not know what to do with them. The score is the log of the mean over ages.

    Args:
        ages: tokens; some of those harvested.
        scale: attention is multiplied by it; it conditions the training, a score is of the attention itself.
    """

    target = "log future attention"

    def __init__(self, ages: Sequence[int] = (128,), scale: float = 1000.0) -> None:
        if not ages or scale <= 0:
            raise SmartKVError(f"ages must not be empty and scale must be above 0, got {list(ages)} and {scale}")
        self.ages, self.scale = tuple(ages), scale
        self.outputs = len(self.ages)
        self.arguments = self.settings = {"ages": list(ages), "scale": scale}

    def targets(self, labels: Labels) -> Tensor:
        if labels.future_attention is None or (missing := sorted(set(self.ages) - set(labels.ages))):
            wanted = self.ages if labels.future_attention is None else missing
            raise SmartKVError(f"the shards hold no future attention from ages {list(wanted)}: harvest them")
        chosen = [labels.ages.index(age) for age in self.ages]
        return labels.future_attention[chosen].movedim(0, -1) * self.scale

    def start(self, mean: Tensor) -> Tensor:
        return mean.clamp(min=1e-6).log()

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()  # the window may have ended before an age's follow-up did
        filled = target.nan_to_num(0.0)
        return ((prediction.clamp(max=12).exp() - filled * prediction) * known).sum(dim=-1)

    def score(self, prediction: Tensor) -> Tensor:
        count = torch.tensor(self.outputs * self.scale, device=prediction.device)
        return prediction.logsumexp(dim=-1) - count.log().to(prediction.dtype)


class Ranking(Objective):
    """Which of two keys of a head lives longer: a logistic loss over random pairs, weighted by how much longer.

    Args:
        pairs: partners of each key a step.
    """

    target = "rank of lifespan"

    def __init__(self, pairs: int = 4) -> None:
        if pairs < 1:
            raise SmartKVError(f"pairs must be at least 1, got {pairs}")
        self.pairs, self.settings, self.arguments = pairs, {}, {"pairs": pairs}

    def start(self, mean: Tensor) -> Tensor:
        return torch.zeros_like(mean)

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        rows, total = prediction.shape[1], 0 * prediction[..., 0]  # of one row too it has a gradient
        for pair in range(min(self.pairs, rows - 1)):
            shift = 1 + pair * (rows - 1) // self.pairs  # rows are in random order
            longer = target - target.roll(shift, dims=1)
            ahead = prediction - prediction.roll(shift, dims=1)
            total = total + (longer.abs() * F.softplus(-longer.sign() * ahead))[..., 0]
        return total / self.pairs


def objective_of_target(target: str, settings: dict[str, Any]) -> Objective | None:
    """The objective whose `score` reads gates of that target; None: their only output is the score."""
    if target == OrdinalAges.target:
        return OrdinalAges(**settings)
    return FutureAttention(**settings) if target == FutureAttention.target else None
