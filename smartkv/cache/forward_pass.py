"""The forward pass on an evicting cache in which a thread is, and the attention function of such a pass.

Threads share a model's modules. So what belongs to one pass stands in a thread-local variable and not on the model: a
pass of one thread changes no call of another.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from smartkv.cache.autocast import as_autocast, without_autocast
from smartkv.errors import SmartKVError
from smartkv.models.attention_interface import AttentionInputs, register_attention
from smartkv.models.softmax import Softmax

EVICTING = "smartkv_evicting"


class EvictionStep(NamedTuple):
    """Inputs of one layer's attention in a forward pass.

    Attributes:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key: `[batch, kv_heads, tokens, head_dim]`, after the rotary embedding.
        value: `[batch, kv_heads, tokens, head_dim]`.
        pre_rope: the keys before the rotary embedding, shaped like `key`.
        real: bool `[batch, tokens]`, False for padding; None: no padding.
        softmax: the step from products of queries and keys to probabilities.
        sliding_window: of the model itself, in tokens; None: it has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pre_rope: Tensor
    real: Tensor | None
    softmax: Softmax
    sliding_window: int | None


class AttendingCache(Protocol):
    """What a forward pass asks of its cache."""

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Store the tokens of a pass in one layer; return attention, `[batch, query_heads, tokens, head_dim]`."""


class ForwardPass:
    """One call of a decoder with an evicting cache.

    Args:
        decoder: the model's decoder.
        cache: the evicting cache.

    Attributes:
        real: bool `[batch, tokens]` of the tokens that go through the decoder now, False for padding; None: no padding.
        keys: pre-RoPE keys by attention module, from the hook that reads them until attention takes them.
        attended: layers whose attention the cache has computed for these tokens.
    """

    def __init__(self, decoder: nn.Module, cache: AttendingCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.real: Tensor | None = None
        self.keys: dict[nn.Module, Tensor] = {}
        self.attended: set[int] = set()


class _Current(threading.local):
    forward_pass: ForwardPass | None = None


_current = _Current()


def current_pass() -> ForwardPass | None:
    """Return the pass in which this thread is; None: it is in none."""
    return _current.forward_pass


@contextmanager
def in_pass(forward_pass: ForwardPass | None) -> Iterator[None]:
    """Context manager in which this thread is in a pass; None: in no pass, as for a plain call inside a pass."""
    before = _current.forward_pass
    _current.forward_pass = forward_pass
    try:
        yield
    finally:
        _current.forward_pass = before


class PassConfig:
    """A view of the config of attention modules, which names the attention function of the current thread.

    An attention module looks its attention function up in its config. The view answers `EVICTING` to a thread that is
    in a pass through `decoder`. Everything else, and everything in other threads, is read from and written to the
    config itself.

    Args:
        config: of the attention module.
        decoder: to which the attention module belongs.
    """

    def __init__(self, config: Any, decoder: nn.Module) -> None:
        self.__dict__.update(_smartkv_config=config, _smartkv_decoder=decoder)

    @property
    def _attn_implementation(self) -> str:
        forward_pass = _current.forward_pass
        if forward_pass is not None and forward_pass.decoder is self.__dict__["_smartkv_decoder"]:
            return EVICTING
        return self.__dict__["_smartkv_config"]._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str) -> None:
        self.__dict__["_smartkv_config"]._attn_implementation = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance(view, PreTrainedConfig) holds
        return type(self.__dict__["_smartkv_config"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask an object that has no attributes yet
            raise AttributeError(name)
        return getattr(self.__dict__["_smartkv_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_attn_implementation":
            object.__setattr__(self, name, value)
        else:
            setattr(self.__dict__["_smartkv_config"], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PassConfig":
        own = self.__dict__
        return PassConfig(deepcopy(own["_smartkv_config"], memo), deepcopy(own["_smartkv_decoder"], memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return PassConfig, (self.__dict__["_smartkv_config"], self.__dict__["_smartkv_decoder"])


def _attend(inputs: AttentionInputs) -> Tensor:
    """Compute the attention of one layer through the cache of the current pass."""
    forward_pass = _current.forward_pass
    if forward_pass is None:
        raise SmartKVError(
            f"the attention function '{EVICTING}' works on a LifespanCache or an AdaptiveCache only, and is chosen by "
            "model(ids, past_key_values=cache): set another one with model.set_attn_implementation('sdpa')"
        )
    pre_rope, window = forward_pass.keys.pop(inputs.module), inputs.sliding_window
    query, key, value, pre_rope = as_autocast(inputs.query, inputs.key, inputs.value, pre_rope)
    step = EvictionStep(query, key, value, pre_rope, forward_pass.real, inputs.softmax, window)
    forward_pass.attended.add(inputs.layer)
    with without_autocast(step.key.device):
        return forward_pass.cache.attend(inputs.layer, step)


register_attention(EVICTING, _attend)
