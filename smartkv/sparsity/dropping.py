"""Ways to drop keys during training, from which a config chooses one by class name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.standardization import StandardizedGates
from smartkv.io.class_names import Persisted
from smartkv.models.backbone import Backbone
from smartkv.models.key_hooks import read_keys
from smartkv.sparsity.anchors import Anchors
from smartkv.sparsity.key_dropout import GatedDropping, KeyDropout, Seen, Share, window_attention


class Dropping(Persisted, ABC):
    """Base class of ways to drop keys while a model is trained.

    Attributes:
        gates: Gates that are trained with the model. None if there are none.
    """

    gates: StandardizedGates | None = None

    def price(self) -> float | None:
        """Return the price of the whole cache, in nats per token, for gates that are trained.

        None if no gates are trained.
        """
        return None

    def prepare(self, lm: Backbone) -> None:
        """Prepare for the model that will be trained; called once."""
        return

    def begin(self, lm: Backbone, windows: Iterable[Tensor]) -> None:
        """Prepare what is trained with the model; called once, after `prepare` and before the model is changed.

        Args:
            lm: The model and its tokenizer.
            windows: Token ids of some training windows, int64 `[tokens]` each.
        """
        return

    @abstractmethod
    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        """Make a context in which the model attends without the dropped keys.

        Args:
            lm: The model and its tokenizer.
            ids: Token ids, int64 `[batch, tokens]`, without padding.
            keep_ratio: Share of the keys that stay, used if keys are dropped at random.
            seeds: Seeds of the random draws, one per row.

        Returns:
            A context manager that yields a function for the footprint (see `Seen`).
        """


class NoDropping(Dropping):
    """A full cache, which is plain fine-tuning and the baseline of the others."""

    def __init__(self) -> None:
        self.arguments = {}

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        """Change nothing; the footprint is 1."""
        return nullcontext(lambda _: torch.ones(()))


class RandomDropping(Dropping):
    """Random dropping of keys that are no anchors.

    Args:
        sinks: Number of tokens at the start that stay.
        recent: Number of latest tokens that every query sees.
        special: Whether special tokens stay.
        punctuation: Whether tokens of nothing but punctuation stay.
        share: Which heads share a draw: "head" (none), "layer" (the heads of a layer) or "model" (all).
    """

    def __init__(
        self, sinks: int = 4, recent: int = 64, special: bool = True, punctuation: bool = True, share: Share = "head"
    ) -> None:
        self.anchors, self.share = Anchors(sinks, recent, special, punctuation), share
        self.arguments = {"sinks": sinks, "recent": recent, "special": special, "punctuation": punctuation}
        self.arguments |= {"share": share}

    def prepare(self, lm: Backbone) -> None:
        """Classify the tokenizer's vocabulary."""
        self.table = self.anchors.table(lm.tokenizer)

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        """Draw which keys stay and attend without the others."""
        arch = lm.architecture
        dropout = KeyDropout(arch.layers, arch.kv_heads, self.anchors.recent, self.share)
        return dropout.dropped(lm.model, self.anchors.always(ids, self.table), keep_ratio, seeds)


class WindowDropping(Dropping):
    """A sliding window with sinks, the same as the cache's policy `window`.

    Args:
        window: Number of latest tokens that a query sees, its own included.
        sinks: Number of tokens at the start that every query sees.

    Raises:
        SmartKVError: A number is too small.
    """

    def __init__(self, window: int = 128, sinks: int = 4) -> None:
        if window < 1 or sinks < 0:
            raise SmartKVError(f"window must be at least 1 and sinks at least 0, got {window} and {sinks}")
        self.window, self.sinks = window, sinks
        self.arguments = {"window": window, "sinks": sinks}

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        """Attend within the window."""
        return window_attention(lm.model, self.window, self.sinks, *ids.shape)


class GateDropping(Dropping):
    """Dropping by gates, either as in the cache or by soft decisions.

    Args:
        gates: Folder, hub id or shipped name of gates that judge by age.
        footprint: Share of the full cache for which the gates' price is taken.
        temperature: Temperature of soft decisions. None means hard decisions, as in the cache.
        train: Whether the gates are trained with the model, which needs a temperature.

    Raises:
        SmartKVError: The gates are to be trained without a temperature.
    """

    def __init__(
        self,
        gates: str = "smollm2-135m-instruct",
        footprint: float = 0.125,
        temperature: float | None = None,
        train: bool = False,
    ) -> None:
        if train and temperature is None:
            raise SmartKVError("gates are trained through soft decisions: give a temperature, such as 0.2")
        self.name, self.footprint, self.temperature, self.train = gates, footprint, temperature, train
        self.arguments = {"gates": gates, "footprint": footprint, "temperature": temperature, "train": train}

    def prepare(self, lm: Backbone) -> None:
        """Load the gates for the model."""
        bank = GateBank.from_pretrained(self.name, lm.model).to(lm.model.device).float()
        bank.requires_grad_(self.train)
        self.rule = GatedDropping(bank, self.footprint, self.temperature)

    def begin(self, lm: Backbone, windows: Iterable[Tensor]) -> None:
        """Let the gates learn on standardised keys, if they are trained."""
        if self.train:
            self.gates = self.rule.standardize(read_keys(lm.model, ids) for ids in windows)

    def price(self) -> float | None:
        """Return the price of the whole cache, in nats per token, if the gates are trained."""
        return math.exp(self.rule.price) if self.train else None

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        """Attend as the gates decide."""
        return self.rule.dropped(lm.model)
