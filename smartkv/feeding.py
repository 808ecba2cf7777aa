"""How a model is brought to work on a cache that evicts.

`follow_cache` puts a forward of ours on the decoder. Called with such a cache it attends by way of the cache, for that
pass alone, and feeds the tokens in pieces, so that no layer ever holds the keys of a whole prompt; called with anything
else it does what it did before.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.attention import register_key_hooks
from smartkv.backbones import attention_modules
from smartkv.errors import SmartKVError

EVICTING = "smartkv_evicting"
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "token_type_ids")
_SESSION = "_smartkv_session"


@dataclass(frozen=True)
class EvictionStep:
    """What one layer's attention gets in a forward pass.

    Attributes:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key, value: `[batch, kv_heads, tokens, head_dim]`, of the new tokens.
        pre_rope: the keys before the rotary embedding, shaped like `key`.
        real: bool `[batch, tokens]`, False for padding; None: no padding.
        scaling: factor on the scores.
        sliding_window: of the model itself, in tokens; None: it has none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pre_rope: Tensor
    real: Tensor | None
    scaling: float
    sliding_window: int | None


class EvictingCache(Protocol):
    """What a model works on."""

    chunk: int

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Attention of one layer, `[batch, query_heads, tokens, head_dim]`."""

    def check_call(self, tokens: int) -> None:
        """Refuse a forward pass over so many tokens, by an exception."""

    def check_length(self, tokens: int) -> None:
        """Refuse to grow to so many tokens, by an exception."""


@dataclass
class Session:
    """A model's work on evicting caches; one for all caches that it follows."""

    followers: int = 0
    cache: EvictingCache | None = None
    real: Tensor | None = None
    keys: dict[nn.Module, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def on_keys(self, module: nn.Module, keys: Tensor) -> None:
        """Remember a layer's pre-RoPE keys until its attention takes them, a moment later."""
        if self.cache is not None:
            self.keys[module] = keys

    @contextmanager
    def work_on(self, cache: EvictingCache, configs: list[Any]) -> Iterator[None]:
        """Inside, the model attends by way of `cache`."""
        before = [config._attn_implementation for config in configs]
        self.cache = cache
        try:
            for config in configs:  # what set_attn_implementation does, without its checks for every token
                config._attn_implementation = EVICTING
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation = implementation
            self.cache = self.real = None
            self.keys.clear()


def evicting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` `[batch, query_heads, tokens, head_dim]` ->
    (output `[batch, tokens, query_heads, head_dim]`, None)."""
    session: Session = module.__dict__[_SESSION]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    step = EvictionStep(query, key, value, session.keys.pop(module), session.real, scaling, sliding_window)
    output = session.cache.attend(module.layer_idx, step)  # type: ignore[union-attr, arg-type]
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The cache knows what is visible."""


AttentionInterface.register(EVICTING, evicting_attention)
AttentionMaskInterface.register(EVICTING, _no_mask)


def follow_cache(model: PreTrainedModel, evicting: type[Cache]) -> Callable[[], None]:
    """From now on `model` takes caches of class `evicting` (each an `EvictingCache`) as `past_key_values`.

    Returns:
        What undoes it; the model is as it was when every follower has done so. Calling it twice does no harm.
    """
    decoder, modules = model.base_model, attention_modules(model)
    session: Session | None = decoder.__dict__.get(_SESSION)
    if session is None:
        session = Session()
        session.handles = register_key_hooks(model, session.on_keys)
        for module in (decoder, *modules):
            module.__dict__[_SESSION] = session
        decoder.__dict__["forward"] = _forward(decoder.forward, session, evicting, _configs(model))
        prepare = getattr(model, "_prepare_cache_for_generation", None)
        if prepare is not None:
            model.__dict__["_prepare_cache_for_generation"] = _prepare(prepare, evicting)
    session.followers += 1
    undone = False

    def undo() -> None:
        nonlocal undone
        if undone:
            return
        undone = True
        session.followers -= 1
        if not session.followers:
            for handle in session.handles:
                handle.remove()
            for module in (decoder, *modules):
                del module.__dict__[_SESSION]
            del decoder.__dict__["forward"]
            model.__dict__.pop("_prepare_cache_for_generation", None)

    return undo


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configs that say how a model attends, each once."""
    modules = (model, model.base_model, *attention_modules(model))
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    return list(configs.values())


def _forward(
    plain: Callable[..., Any], session: Session, evicting: type[Cache], configs: list[Any]
) -> Callable[..., Any]:
    """The decoder's forward, which takes evicting caches too."""

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, evicting):
            if any(isinstance(value, evicting) for value in args):
                raise SmartKVError("hand the cache over by name: model(ids, past_key_values=cache)")
            return plain(*args, **kwargs)
        if len(args) > 1:
            raise SmartKVError("with a LifespanCache only input_ids may be given without its name")
        if args:  # the first argument of every family's decoder
            kwargs["input_ids"] = args[0]
        tokens, real = _tokens_and_padding(kwargs)
        cache.check_call(tokens)  # type: ignore[attr-defined]
        kwargs["attention_mask"] = None  # the cache knows what it says
        with session.work_on(cache, configs):  # type: ignore[arg-type]
            return _in_chunks(plain, kwargs, session, cache.chunk, tokens, real)  # type: ignore[attr-defined]

    return forward


def _tokens_and_padding(kwargs: dict[str, Any]) -> tuple[int, Tensor | None]:
    """How many tokens a call has, and which of them are real: bool `[batch, tokens]`; None: all."""
    given = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if given is None:
        raise SmartKVError("the model was given neither input_ids nor inputs_embeds")
    tokens, mask = given.shape[1], kwargs.get("attention_mask")
    if mask is None:
        return tokens, None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens:
        what = f"{mask.dim()}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SmartKVError(f"a LifespanCache takes an attention mask [batch, tokens] that marks padding, got {what}")
    real = mask[:, -tokens:].bool()
    return tokens, None if bool(real.all()) else real


def _in_chunks(
    plain: Callable[..., Any], kwargs: dict[str, Any], session: Session, chunk: int, tokens: int, real: Tensor | None
) -> Any:
    """One forward pass, `chunk` tokens at a time; outputs are put together again."""
    session.real = real
    if tokens <= chunk:
        return plain(**kwargs)
    outputs = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        here = dict(kwargs)
        for name in TOKEN_INPUTS:
            value = kwargs.get(name)
            if isinstance(value, Tensor):
                here[name] = value[start:stop] if value.dim() == 1 else value[:, start:stop]
        session.real = None if real is None or bool(real[:, start:stop].all()) else real[:, start:stop]
        outputs.append(plain(**here))
    return _joined(outputs)


def _joined(outputs: list[Any]) -> Any:
    """The last output with the hidden states of all: `[batch, tokens, hidden]`."""
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[-1][1:])
    whole = outputs[-1]
    whole["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], dim=1)
    if whole.get("hidden_states") is not None:
        layers = zip(*(output["hidden_states"] for output in outputs), strict=True)
        whole["hidden_states"] = tuple(torch.cat(parts, dim=1) for parts in layers)
    return whole


def _prepare(plain: Callable[..., Any], evicting: type[Cache]) -> Callable[..., Any]:
    """`generate` asks for its cache here, before any token: the place to say that there is no room for so many."""

    @functools.wraps(plain)
    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, evicting) and generation_config.max_length is not None:
            cache.check_length(generation_config.max_length)  # type: ignore[attr-defined]
        return plain(generation_config, model_kwargs, *args, **kwargs)

    return prepare
