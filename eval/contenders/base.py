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
    """Figures of one text that was read under a contender.

    Attributes:
        nll: float32 `[scored tokens]`, nats.
        rank: int64 `[scored tokens]`, the number of tokens that are likelier; 0: greedy decoding would choose it.
        footprint: share of a full cache's keys that the counted queries see, mean over KV heads.
        peak_bytes: largest storage in bytes; None: eviction is simulated by a mask and nothing is freed.
        stored: bytes held after the text ÷ bytes of its keys and values in float16, see `stored_share`; None: simulated
            by a mask.
        held: keys held after the text ÷ those of a full cache; None: simulated by a mask.
    """

    nll: Tensor
    rank: Tensor
    footprint: float
    peak_bytes: int | None
    stored: float | None = None
    held: float | None = None


class Contender(Protocol):
    """A way to decide which keys stay in the cache.

    Attributes:
        name: its name in results.
        kind: ours, rule, null, oracle, quantised (every key stays, in few bits), or full.
        needs: its input at inference: nothing, keys, queries, attention weights, or the text to come.
    """

    @property
    def name(self) -> str:
        """Name in results."""

    @property
    def kind(self) -> str:
        """One of ours, rule, null, oracle, quantised and full."""

    @property
    def needs(self) -> str:
        """Input at inference."""

    def solved(self, footprint: float) -> Any:
        """Find the setting that keeps a share of the cache (protocol `stream`) or of the prefill's keys (`once`).

        Returns:
            The setting, fit for JSON; `read` takes it.

        Raises:
            FootprintOutOfReach: no setting keeps that share.
        """

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text and score its tokens.

        Args:
            setting: a result of `solved`.
            tokens: ids `[tokens]`.
            first_token: tokens from this one on are scored.
            first_query: queries from this one on count for the footprint.
            prefill: number of tokens after which keys are evicted, for protocol `once`; None: protocol `stream`.
        """


class Decoding(Protocol):
    """A contender that can also decode, because it has a real cache.

    Attributes:
        at_once: number of a prompt's tokens that go through the model together; None: all.
    """

    at_once: int | None

    def open(self, setting: Any, first_query: int) -> AbstractContextManager[Cache]:
        """Open a new cache for the model; it is closed at the end of the `with` block.

        Args:
            setting: a result of `solved`.
            first_query: queries from this one on count for the footprint.
        """


class FullCache:
    """The full cache, with which all others are compared."""

    at_once: int | None = None
    name, kind, needs = "full", "full", "nothing"

    def __init__(self, lm: Backbone) -> None:
        self.lm = lm

    def solved(self, footprint: float) -> Any:
        """Return the share that a full cache keeps."""
        return 1.0

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text with all keys; see `Contender.read`."""
        return Reading(*token_losses(self.lm.model, tokens, first_token), 1.0, None)

    def open(self, setting: Any, first_query: int) -> AbstractContextManager[Cache]:
        """Open a `DynamicCache`; see `Decoding.open`."""
        return nullcontext(DynamicCache())


def held_share(lm: Backbone, cache: LifespanCache, tokens: int) -> float:
    """Return keys of a cache of one row ÷ keys of a full cache after as many tokens."""
    return float(cache.live_keys.sum()) / lm.architecture.keys_of_full_cache(tokens)


def stored_share(lm: Backbone, cache: LifespanCache | QuantizedCache, tokens: int) -> float:
    """Return bytes of a cache ÷ bytes of a full cache of one sequence in float16.

    Keys and values that are not packed count as two bytes an element, whatever dtype the model computes in.

    Args:
        lm: the model.
        cache: a cache of one row.
        tokens: number of tokens that it has read.
    """
    wider = cache.exact_bytes * (1 - 2 / lm.model.dtype.itemsize)
    full = 2 * lm.architecture.keys_of_full_cache(tokens) * lm.architecture.head_dim * 2
    return (cache.storage_bytes - wider) / full
