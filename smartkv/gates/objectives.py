"""Training objectives of gates, one class per objective.

An objective turns a key's labels into targets, computes a loss per row, and turns the outputs of a gate into a score.
A policy compares the score with its price: keys with a larger score stay longer. Distillation trains through the model
itself and is in `smartkv.distillation.kl_divergence`.
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
    """Base class of objectives.

    Attributes:
        outputs: Number of outputs per gate.
        target: Name of the target in the `config.json` of exported gates.
        settings: Arguments with which `objective_of_target` rebuilds the objective.
        in_log4: Whether the score estimates log4 lifespan, so that an R² can be computed.
    """

    outputs, in_log4 = 1, False
    target: str
    settings: dict[str, Any]

    def targets(self, labels: Labels) -> Tensor:
        """Compute the targets of a batch of keys.

        Args:
            labels: Labels of the keys, all with shapes `[…, gates, rows]`.

        Returns:
            float32 `[gates, rows, outputs]`.
        """
        return labels.log4_lifespan[..., None]

    def start(self, mean: Tensor) -> Tensor:
        """Compute the initial biases of the outputs.

        Args:
            mean: Mean of each target over the training keys, `[gates, outputs]`.

        Returns:
            `[gates, outputs]`.
        """
        return mean

    @abstractmethod
    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of each row, not reduced.

        Args:
            prediction: `[gates, rows, outputs]`.
            target: `[gates, rows, outputs]`.

        Returns:
            `[gates, rows]`.
        """

    def score(self, prediction: Tensor) -> Tensor:
        """Turn predictions `[…, outputs]` into scores `[…]`; a key with a larger score stays longer."""
        return prediction[..., 0]


class Log4Lifespan(Objective):
    """Regression of log4 lifespan, with a lifespan in tokens as in `smartkv.labels.lifespans`.

    MSE estimates the mean; the Huber loss estimates a value between the mean and the median.

    Args:
        loss: "huber" or "mse".
        huber_delta: Error at which the Huber loss turns from quadratic to linear, in units of log4 (factors of 4).

    Raises:
        SmartKVError: The loss is unknown, or the delta is 0 or less.
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
        """Compute the MSE or Huber loss of each row."""
        if self.loss == "mse":
            return F.mse_loss(prediction, target, reduction="none")[..., 0]
        return F.huber_loss(prediction, target, reduction="none", delta=self.huber_delta)[..., 0]


class OrdinalAges(Objective):
    """Ordinal classification: for each of some ages, whether later queries still hit the key.

    A gate has one logit per age, trained by binary cross-entropy. The score is the mean log4 lifespan that these
    probabilities imply. A lifespan between two ages counts as the lower age.

    Args:
        ages: Ages in tokens, ascending, each below the follow-up.

    Raises:
        SmartKVError: There are no ages, or they are not ascending from at least 1.
    """

    target, in_log4 = "life beyond ages", True

    def __init__(self, ages: Sequence[int] = (4, 16, 64, 256)) -> None:
        if not ages or list(ages) != sorted(set(ages)) or min(ages) < 1:
            raise SmartKVError(f"ages must be ascending numbers of tokens, at least 1, got {list(ages)}")
        self.ages, self.outputs = tuple(ages), len(ages)
        self.arguments = self.settings = {"ages": list(ages)}

    def _log4_ages(self, device: torch.device) -> Tensor:
        return torch.tensor(self.ages, dtype=torch.float64, device=device).log2() / 2

    def targets(self, labels: Labels) -> Tensor:
        """Compute 1 for each age that a key outlives and 0 for the others, `[gates, rows, ages]`."""
        lifespan = labels.log4_lifespan[..., None].double()
        return (lifespan > self._log4_ages(lifespan.device) + 1e-6).float()  # the margin absorbs rounding

    def start(self, mean: Tensor) -> Tensor:
        """Compute the logit of each age's share of keys."""
        return mean.clamp(1e-4, 1 - 1e-4).logit()

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the binary cross-entropy of each row, summed over ages."""
        return F.binary_cross_entropy_with_logits(prediction, target, reduction="none").sum(dim=-1)

    def score(self, prediction: Tensor) -> Tensor:
        """Compute the mean log4 lifespan that the predicted probabilities imply."""
        steps = self._log4_ages(prediction.device).diff(
            prepend=torch.zeros(1, dtype=torch.float64, device=prediction.device)
        )
        return (prediction.sigmoid() * steps.to(prediction.dtype)).sum(dim=-1)


class FutureAttention(Objective):
    """Log of the mean attention that a key gets from each of some ages on.

    The loss `exp(p) − m·p` is a Poisson likelihood. It is smallest where `exp(p)` is the mean of the attention `m`,
    zeros included; a regression of `log m` could not use the zeros. The score is the log of the mean over ages.

    Args:
        ages: Ages in tokens, a selection of those harvested.
        scale: Factor on the attention during training, for conditioning. The score is free of it.

    Raises:
        SmartKVError: There are no ages, or the scale is 0 or less.
    """

    target = "log future attention"

    def __init__(self, ages: Sequence[int] = (128,), scale: float = 1000.0) -> None:
        if not ages or scale <= 0:
            raise SmartKVError(f"ages must not be empty and scale must be above 0, got {list(ages)} and {scale}")
        self.ages, self.scale = tuple(ages), scale
        self.outputs = len(self.ages)
        self.arguments = self.settings = {"ages": list(ages), "scale": scale}

    def targets(self, labels: Labels) -> Tensor:
        """Select the future attention of the ages, times `scale`, `[gates, rows, ages]`.

        Raises:
            SmartKVError: The shards do not hold the future attention of these ages.
        """
        if labels.future_attention is None or (missing := sorted(set(self.ages) - set(labels.ages))):
            wanted = self.ages if labels.future_attention is None else missing
            raise SmartKVError(
                f"the shards hold no future attention from ages {list(wanted)}: harvest again with these ages"
            )
        chosen = [labels.ages.index(age) for age in self.ages]
        return labels.future_attention[chosen].movedim(0, -1) * self.scale

    def start(self, mean: Tensor) -> Tensor:
        """Compute the log of the mean of each target."""
        return mean.clamp(min=1e-6).log()

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the Poisson loss of each row, summed over the ages whose target is known (not NaN)."""
        known = ~target.isnan()  # unknown where the window ends before the follow-up of an age does
        filled = target.nan_to_num(0.0)
        return ((prediction.clamp(max=12).exp() - filled * prediction) * known).sum(dim=-1)

    def score(self, prediction: Tensor) -> Tensor:
        """Compute the log of the mean predicted attention over ages."""
        count = torch.tensor(self.outputs * self.scale, device=prediction.device)
        return prediction.logsumexp(dim=-1) - count.log().to(prediction.dtype)


class Ranking(Objective):
    """Ranking of keys by lifespan, with a logistic loss over random pairs of keys of the same head.

    A pair is weighted by the difference of its log4 lifespans.

    Args:
        pairs: Number of partners per key and training step.

    Raises:
        SmartKVError: There are fewer pairs than 1.
    """

    target = "rank of lifespan"

    def __init__(self, pairs: int = 4) -> None:
        if pairs < 1:
            raise SmartKVError(f"pairs must be at least 1, got {pairs}")
        self.pairs, self.settings, self.arguments = pairs, {}, {"pairs": pairs}

    def start(self, mean: Tensor) -> Tensor:
        """Return zeros, because only differences of outputs matter."""
        return torch.zeros_like(mean)

    def row_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the weighted logistic loss of each row against its partners."""
        rows, total = prediction.shape[1], 0 * prediction[..., 0]  # a gradient exists also for a single row
        for pair in range(min(self.pairs, rows - 1)):
            shift = 1 + pair * (rows - 1) // self.pairs  # the rows are shuffled, so a shift pairs them at random
            longer = target - target.roll(shift, dims=1)
            ahead = prediction - prediction.roll(shift, dims=1)
            total = total + (longer.abs() * F.softplus(-longer.sign() * ahead))[..., 0]
        return total / self.pairs


def objective_of_target(target: str, settings: dict[str, Any]) -> Objective | None:
    """Find the objective whose `score` reads gates trained on a target.

    Args:
        target: Target in the gates' `config.json`.
        settings: Its `objective` entry.

    Returns:
        The objective; None if the single output of the gates is the score itself.
    """
    if target == OrdinalAges.target:
        return OrdinalAges(**settings)
    return FutureAttention(**settings) if target == FutureAttention.target else None
