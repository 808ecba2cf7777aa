"""How a model is brought to work on a cache that evicts.

`patch_model` puts a forward of ours on the decoder. Called with such a cache it attends by way of the cache, for that
pass alone, and feeds the tokens in pieces, so that no layer ever holds the keys of a whole prompt; called with anything
else it does what it did before.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.generation import GenerationMode

from smartkv.errors import SmartKVError
from smartkv.models.architecture import attention_modules
from smartkv.models.attention_interface import default_scaling, register_attention
from smartkv.models.key_hooks import register_key_hooks

EVICTING = "smartkv_evicting"
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "token_type_ids")
CACHE_NAMES = ("past_key_values", "cache")  # a model's argument: what it was called before transformers 5.24, and since
_SESSION = "_smartkv_session"


class EvictionStep(NamedTuple):
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

    def check_call(self, decoder: nn.Module, tokens: int) -> None:
        """Refuse a forward pass of `decoder` over so many tokens, by an exception."""

    def check_length(self, tokens: int) -> None:
        """Refuse to grow to so many tokens, by an exception."""


class Session:
    """A model's work on evicting caches, one for all that it follows, and the forward of its decoder meanwhile.

    It holds the model's parts by name and no closure does, so a copy of the model gets a session of its own.

    Attributes:
        plain: the decoder's forward as it was.
        followers: caches that follow the model.
        cache: the one that the model works on just now; None: it is in no pass on such a cache.
        real: bool `[batch, tokens]` of the pass, False for padding; None: no padding.
        keys: of each attention module, from where they are read until attention takes them, a moment later.
    """

    def __init__(self, model: PreTrainedModel, evicting: type[Cache]) -> None:
        self.decoder, self.modules, self.evicting = model.base_model, attention_modules(model), evicting
        holders = (model, self.decoder, *self.modules)  # each config that says how the model attends, once
        self.configs: list[Any] = list({id(m.config): m.config for m in holders if hasattr(m, "config")}.values())
        self.plain: Callable[..., Any] = self.decoder.forward
        functools.update_wrapper(self, self.plain)  # some read a forward's signature
        self.followers = 0
        self.cache: EvictingCache | None = None
        self.real: Tensor | None = None
        self.keys: dict[nn.Module, Tensor] = {}
        self.handles = register_key_hooks(model, self.on_keys)

    def on_keys(self, module: nn.Module, keys: Tensor) -> None:
        """Remember a layer's pre-RoPE keys."""
        if self.cache is not None:
            self.keys[module] = keys

    @contextmanager
    def work_on(self, cache: EvictingCache) -> Iterator[None]:
        """Inside, the model attends by way of `cache`."""
        before = [config._attn_implementation for config in self.configs]
        self.cache = cache
        try:
            for config in self.configs:  # what set_attn_implementation does, without its checks for every token
                config._attn_implementation = EVICTING
            yield
        finally:
            for config, implementation in zip(self.configs, before, strict=True):
                config._attn_implementation = implementation
            self.cache = self.real = None
            self.keys.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward, which takes evicting caches too."""
        cache = _evicting_cache(kwargs, self.evicting)
        if cache is None:
            if any(isinstance(value, self.evicting) for value in args):
                raise SmartKVError("hand the cache over by name: model(ids, past_key_values=cache)")
            return self.plain(*args, **kwargs)
        if len(args) > 1:
            raise SmartKVError(f"with a {type(cache).__name__} only input_ids may be given without its name")
        if args:  # the first argument of every family's decoder
            kwargs["input_ids"] = args[0]
        tokens, real = _tokens_and_padding(kwargs)
        cache.check_call(self.decoder, tokens)
        kwargs["attention_mask"] = None  # the cache knows what it says
        # no gradients, and plain tensors also in `torch.inference_mode`: what is stored may be changed outside of it
        with torch.inference_mode(False), torch.no_grad(), self.work_on(cache):
            return _in_chunks(self.plain, kwargs, self, cache.chunk, tokens, real)


def _evicting_cache(kwargs: dict[str, Any], evicting: type[Cache]) -> Any:
    """The cache among a call's arguments if it is an `EvictingCache`; else None."""
    given = (kwargs.get(name) for name in CACHE_NAMES)
    return next((cache for cache in given if isinstance(cache, evicting)), None)


def is_evicting(model: PreTrainedModel, cache: EvictingCache) -> bool:
    """Whether `model` is in a forward pass on `cache`."""
    session: Session | None = model.base_model.__dict__.get(_SESSION)
    return session is not None and session.cache is cache


def evicting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # in this place: kvpress, once imported, gives it by position
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` `[batch, query_heads, tokens, head_dim]` ->
    (output `[batch, tokens, query_heads, head_dim]`, None)."""
    session: Session = module.__dict__[_SESSION]
    scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
    step = EvictionStep(query, key, value, session.keys.pop(module), session.real, scaling, sliding_window)
    output = session.cache.attend(module.layer_idx, step)  # type: ignore[union-attr, arg-type]
    return output.transpose(1, 2).contiguous(), None


register_attention(EVICTING, evicting_attention)


def patch_model(model: PreTrainedModel, evicting: type[Cache]) -> Callable[[], None]:
    """From now on `model` takes caches of class `evicting` (each an `EvictingCache`) as `past_key_values`.

    Returns:
        What undoes it; the model is as it was when every follower has done so. Calling it twice does no harm.
    """
    decoder = model.base_model
    session: Session | None = decoder.__dict__.get(_SESSION)
    if session is None:
        session = Session(model, evicting)
        for module in (decoder, *session.modules):
            module.__dict__[_SESSION] = session
        decoder.__dict__["forward"] = session
        prepare = getattr(model, "_prepare_cache_for_generation", None)
        if prepare is not None:
            model.__dict__["_prepare_cache_for_generation"] = functools.partial(_prepare, prepare, evicting)
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
            for module in (decoder, *session.modules):
                del module.__dict__[_SESSION]
            del decoder.__dict__["forward"]
            model.__dict__.pop("_prepare_cache_for_generation", None)

    return undo


def _tokens_and_padding(kwargs: dict[str, Any]) -> tuple[int, Tensor | None]:
    """How many tokens a call has, and which of them are real: bool `[batch, tokens]`; None: all."""
    given = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if given is None:
        raise SmartKVError("the model was given neither input_ids nor inputs_embeds")
    if given.dim() < 2:
        raise SmartKVError(f"the model takes input_ids [batch, tokens], got {tuple(given.shape)}")
    (rows, tokens), mask = given.shape[:2], kwargs.get("attention_mask")
    if mask is None:
        return tokens, None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != rows or mask.shape[1] < tokens:
        what = f"{mask.dim()}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SmartKVError(
            f"the cache takes an attention mask [batch, tokens] that marks padding, got {what} "
            f"for {rows} × {tokens} tokens"
        )
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


def _prepare(
    plain: Callable[..., Any],
    evicting: type[Cache],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """`generate` asks for its cache here, before any token: the place to say that it will not do.
    `max_cache_length` counts a prompt that is given as embeddings too, but not the last token, which is never fed."""
    cache = _evicting_cache(model_kwargs, evicting)
    if cache is not None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:  # what was guessed wrongly is cropped
            cache.crop(0)
        cache.check_length(max_cache_length + 1)
    return plain(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
