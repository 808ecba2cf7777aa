"""What a training config chooses from: each says how keys are dropped from a batch of texts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.class_names import Persisted
from smartkv.models.backbone import Backbone
from smartkv.sparsity.anchors import Anchors
from smartkv.sparsity.key_dropout import GatedDropping, KeyDropout, Seen, Share, window_attention


class Dropping(Persisted, ABC):
    """How keys go while a model is trained.

    Attributes:
        gates: that are trained with the model; None: there are none.
    """

    gates: GateBank | None = None

    def price(self) -> float | None:
        """What a key costs gates that learn, in nats a token for the whole cache; None: none do."""
        return None

    def prepare(self, lm: Backbone) -> None:
        """Called once, with the model that will be trained."""
        return

    @abstractmethod
    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        """A context in which the model attends without the keys that went; it gives the footprint (see `Seen`).

        Args:
            ids: int64 `[batch, tokens]`, no padding.
            keep_ratio: share of the keys that stay, where chance decides.
            seeds: of what is drawn, one a row.
        """


class NoDropping(Dropping):
    """A full cache: plain fine-tuning, beside which the others are measured."""

    def __init__(self) -> None:
        self.arguments = {}

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        return nullcontext(lambda _: torch.ones(()))


class RandomDropping(Dropping):
    """Chance, anchors apart.

    Args:
        sinks, recent, special, punctuation: see `Anchors`.
        share: who draws alike: head (nobody), layer (the heads of a layer) or model (all).
    """

    def __init__(
        self, sinks: int = 4, recent: int = 64, special: bool = True, punctuation: bool = True, share: Share = "head"
    ) -> None:
        self.anchors, self.share = Anchors(sinks, recent, special, punctuation), share
        self.arguments = {"sinks": sinks, "recent": recent, "special": special, "punctuation": punctuation}
        self.arguments |= {"share": share}

    def prepare(self, lm: Backbone) -> None:
        self.table = self.anchors.table(lm.tokenizer)

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        arch = lm.architecture
        dropout = KeyDropout(arch.layers, arch.kv_heads, self.anchors.recent, self.share)
        return dropout.dropped(lm.model, self.anchors.always(ids, self.table), keep_ratio, seeds)


class WindowDropping(Dropping):
    """A sliding window with sinks, as it is deployed.

    Args:
        window: latest tokens that are seen.
        sinks: tokens at the start that are seen.
    """

    def __init__(self, window: int = 128, sinks: int = 4) -> None:
        if window < 1 or sinks < 0:
            raise SmartKVError(f"window must be at least 1 and sinks at least 0, got {window} and {sinks}")
        self.window, self.sinks = window, sinks
        self.arguments = {"window": window, "sinks": sinks}

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        return window_attention(lm.model, self.window, self.sinks, *ids.shape)


class GateDropping(Dropping):
    """Our gates, as they are deployed; or softly, and trained with the model.

    Args:
        gates: folder, hub id, or the name of gates that come with SmartKV; they judge for ages.
        footprint: share of the full cache for which their price is taken.
        temperature: of a soft decision; None: keys stay or go.
        train: the gates learn too; with a temperature alone.
    """

    def __init__(
        self,
        gates: str = "smollm2-135m-instruct",
        footprint: float = 0.125,
        temperature: float | None = None,
        train: bool = False,
    ) -> None:
        if train and temperature is None:
            raise SmartKVError("gates learn through a soft decision: give a temperature, such as 0.2")
        self.name, self.footprint, self.temperature, self.train = gates, footprint, temperature, train
        self.arguments = {"gates": gates, "footprint": footprint, "temperature": temperature, "train": train}

    def prepare(self, lm: Backbone) -> None:
        bank = GateBank.from_pretrained(self.name, lm.model).to(lm.model.device).float()
        bank.requires_grad_(self.train)
        self.gates = bank if self.train else None
        self.rule = GatedDropping(bank, self.footprint, self.temperature)

    def price(self) -> float | None:
        return math.exp(self.rule.price) if self.train else None

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        return self.rule.dropped(lm.model)
