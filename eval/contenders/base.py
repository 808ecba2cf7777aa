"""The interface of a contender, and the full cache."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from transformers import Cache, DynamicCache

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.metrics.perplexity import token_losses
from smartkv.models.backbone import Backbone

EvictionProtocol = Literal["stream", "once"]


class Reading(NamedTuple):
    """One text under a contender.

    Attributes:
        nll: float32 `[scored tokens]`, nats.
        rank: int64 `[scored tokens]`, how many tokens are likelier; 0: greedy decoding would have said it.
        footprint: share of a full cache's keys that the counted queries see, mean over KV heads.
        peak_bytes: largest storage; None: simulated by a mask, nothing is freed.
        stored: bytes held when the text was read, over those of its keys and values in float16, see `stored_share`;
            None: a mask.
    """

    nll: Tensor
    rank: Tensor
    footprint: float
    peak_bytes: int | None
    stored: float | None = None


class Contender(Protocol):
    """Decides which keys stay.

    Attributes:
        name: what results call it.
        kind: ours, rule, null, oracle, quantised (every key stays, in few bits), or full.
        needs: what it takes at inference: nothing, keys, queries, attention weights, or the text to come.
    """

    name: str
    kind: str
    needs: str

    def solved(self, footprint: float) -> Any:
        """What it is to be set to, for JSON, to keep that share: of the cache (`stream`) or of the prefill (`once`).

        Raises:
            FootprintOutOfReach: no setting keeps that share.
        """

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read `tokens` (ids `[tokens]`) and score those from `first_token` on.

        Args:
            setting: what `solved` found.
            first_query: queries from this one on count for the footprint.
            prefill: tokens after which keys go, for `once`; None: `stream`.
        """


class Decoding(Protocol):
    """A contender that decodes too, by a real cache.

    Attributes:
        at_once: tokens of a prompt that are fed together; None: all.
    """

    at_once: int | None

    def open(self, setting: Any, first_query: int) -> AbstractContextManager[Cache]:
        """A new cache for the model, for the time inside."""


class FullCache:
    """A full cache."""

    at_once: int | None = None

    name, kind, needs = "full", "full", "nothing"

    def __init__(self, lm: Backbone) -> None:
        self.lm = lm

    def solved(self, footprint: float) -> Any:
        return 1.0

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        return Reading(*token_losses(self.lm.model, tokens, first_token), 1.0, None)

    def open(self, setting: Any, first_query: int) -> AbstractContextManager[Cache]:
        return nullcontext(DynamicCache())


def stored_share(lm: Backbone, cache: LifespanCache | QuantizedCache, tokens: int) -> float:
    """Bytes of a cache over those of one sequence of so many tokens in float16; what is not packed counts as two bytes
    an element, whatever the model computes in here."""
    wider = cache.exact_bytes * (1 - 2 / lm.model.dtype.itemsize)
    return (cache.storage_bytes - wider) / (2 * lm.architecture.gates * lm.architecture.head_dim * 2 * tokens)
