"""Patches a decoder so that it attends through an evicting cache.

`patch_model` replaces the forward of a model's decoder. Called with an evicting cache, the new forward switches the
model to SmartKV's attention function for that pass, and feeds it the tokens in chunks, so that no layer ever holds the
keys of a whole prompt. Called with anything else, it calls the original forward.
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
from smartkv.models.attention_interface import AttentionInputs, register_attention
from smartkv.models.key_hooks import register_key_hooks

EVICTING = "smartkv_evicting"
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "token_type_ids")
CACHE_NAMES = ("past_key_values", "cache")  # of a decoder's argument: before transformers 5.24, and since
_SESSION = "_smartkv_session"


class EvictionStep(NamedTuple):
    """Inputs of one layer's attention in a forward pass.

    Attributes:
        query: `[batch, query_heads, tokens, head_dim]`, after the rotary embedding.
        key: `[batch, kv_heads, tokens, head_dim]`, after the rotary embedding.
        value: `[batch, kv_heads, tokens, head_dim]`.
        pre_rope: the keys before the rotary embedding, shaped like `key`.
        real: bool `[batch, tokens]`, False for padding; None: no padding.
        scaling: factor on the attention scores.
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
    """Interface of the caches that a patched model takes."""

    chunk: int

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Store the tokens of a pass in one layer; return attention, `[batch, query_heads, tokens, head_dim]`."""

    def check_call(self, decoder: nn.Module, tokens: int) -> None:
        """Raise if a forward pass of `decoder` over `tokens` tokens is not possible."""

    def check_length(self, tokens: int) -> None:
        """Raise if the model has no positions for `tokens` tokens in all."""


class Session:
    """The replacement of a decoder's forward, and the state of its passes on evicting caches.

    A model has one session for all caches that are attached to it. The session refers to the model's modules by
    attributes and not in closures, so a deep copy of the model gets a session with the copy's modules.

    Attributes:
        original_forward: the decoder's own forward.
        attached_caches: number of caches that are attached to the model.
        cache: the evicting cache of the current forward pass; None: there is no such pass.
        real: bool `[batch, tokens]` of the current pass, False for padding; None: no padding.
        keys: pre-RoPE keys by attention module, from the hook that reads them until attention takes them.
    """

    def __init__(self, model: PreTrainedModel, evicting: type[Cache]) -> None:
        self.decoder, self.modules, self.evicting = model.base_model, attention_modules(model), evicting
        modules = (model, self.decoder, *self.modules)  # whose configs name the attention function, each config once
        self.configs: list[Any] = list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())
        self.original_forward: Callable[..., Any] = self.decoder.forward
        functools.update_wrapper(self, self.original_forward)  # some callers read a forward's signature
        self.attached_caches = 0
        self.cache: EvictingCache | None = None
        self.real: Tensor | None = None
        self.keys: dict[nn.Module, Tensor] = {}
        self.handles = register_key_hooks(model, self.on_keys)

    def on_keys(self, module: nn.Module, keys: Tensor) -> None:
        """Keep a layer's pre-RoPE keys for its attention, during a pass on an evicting cache."""
        if self.cache is not None:
            self.keys[module] = keys

    @contextmanager
    def using(self, cache: EvictingCache) -> Iterator[None]:
        """Let the model attend through `cache` inside the context."""
        before = [config._attn_implementation for config in self.configs]
        self.cache = cache
        try:
            for config in self.configs:  # as set_attn_implementation does, without its checks at every token
                config._attn_implementation = EVICTING
            yield
        finally:
            for config, implementation in zip(self.configs, before, strict=True):
                config._attn_implementation = implementation
            self.cache = self.real = None
            self.keys.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder, through its evicting cache if it was given one."""
        cache = _evicting_cache(kwargs, self.evicting)
        if cache is None:
            if any(isinstance(value, self.evicting) for value in args):
                raise SmartKVError("give the cache by name: model(ids, past_key_values=cache)")
            return self.original_forward(*args, **kwargs)
        if len(args) > 1:
            raise SmartKVError(
                f"with a {type(cache).__name__} only input_ids may be given by position: give other arguments by name"
            )
        if args:  # the first argument of every family's decoder
            kwargs["input_ids"] = args[0]
        tokens, real = _tokens_and_padding(kwargs)
        cache.check_call(self.decoder, tokens)
        kwargs["attention_mask"] = None  # `real` holds its content
        # the cache may be changed later outside `torch.inference_mode`, so its tensors are not created in it
        with torch.inference_mode(False), torch.no_grad(), self.using(cache):
            return _in_chunks(self.original_forward, kwargs, self, cache.chunk, tokens, real)


def _evicting_cache(kwargs: dict[str, Any], evicting: type[Cache]) -> Any:
    """Return the cache among a call's arguments if it is of the class `evicting`; else None."""
    caches = (kwargs.get(name) for name in CACHE_NAMES)
    return next((cache for cache in caches if isinstance(cache, evicting)), None)


def is_evicting(model: PreTrainedModel, cache: EvictingCache) -> bool:
    """Return whether `model` is in a forward pass on `cache`."""
    session: Session | None = model.base_model.__dict__.get(_SESSION)
    return session is not None and session.cache is cache


def _attend(inputs: AttentionInputs) -> Tensor:
    """Compute the attention of one layer through the evicting cache of the current pass."""
    session: Session = inputs.module.__dict__[_SESSION]
    pre_rope, window = session.keys.pop(inputs.module), inputs.sliding_window
    step = EvictionStep(inputs.query, inputs.key, inputs.value, pre_rope, session.real, inputs.scaling, window)
    return session.cache.attend(inputs.layer, step)  # type: ignore[union-attr]


register_attention(EVICTING, _attend)


def patch_model(model: PreTrainedModel, evicting: type[Cache]) -> Callable[[], None]:
    """Let `model` take caches of the class `evicting` as `past_key_values`.

    Args:
        model: a causal LM of a supported family.
        evicting: a class whose instances are `EvictingCache`s.

    Returns:
        Function that undoes this call. The model is restored when all calls are undone. A second call of the function
        does nothing.
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
    session.attached_caches += 1
    undone = False

    def undo() -> None:
        nonlocal undone
        if undone:
            return
        undone = True
        session.attached_caches -= 1
        if not session.attached_caches:
            for handle in session.handles:
                handle.remove()
            for module in (decoder, *session.modules):
                del module.__dict__[_SESSION]
            del decoder.__dict__["forward"]
            model.__dict__.pop("_prepare_cache_for_generation", None)

    return undo


def _tokens_and_padding(kwargs: dict[str, Any]) -> tuple[int, Tensor | None]:
    """Return the number of tokens in a call, and which are real, bool `[batch, tokens]`; None: no padding."""
    inputs = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if inputs is None:
        raise SmartKVError("the model was given neither input_ids nor inputs_embeds")
    if inputs.dim() < 2:
        raise SmartKVError(f"the model takes input_ids [batch, tokens], got {tuple(inputs.shape)}")
    (rows, tokens), mask = inputs.shape[:2], kwargs.get("attention_mask")
    if mask is None:
        return tokens, None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != rows or mask.shape[1] < tokens:
        shape = f"{mask.dim()}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SmartKVError(
            f"the cache takes an attention mask [batch, tokens] that marks padding, got {shape} "
            f"for {rows} × {tokens} tokens"
        )
    real = mask[:, -tokens:].bool()
    return tokens, None if bool(real.all()) else real


def _in_chunks(
    forward: Callable[..., Any], kwargs: dict[str, Any], session: Session, chunk: int, tokens: int, real: Tensor | None
) -> Any:
    """Run a forward pass `chunk` tokens at a time, and join the outputs."""
    session.real = real
    if tokens <= chunk:
        return forward(**kwargs)
    outputs = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        here = dict(kwargs)
        for name in TOKEN_INPUTS:
            value = kwargs.get(name)
            if isinstance(value, Tensor):
                here[name] = value[start:stop] if value.dim() == 1 else value[:, start:stop]
        session.real = None if real is None or bool(real[:, start:stop].all()) else real[:, start:stop]
        outputs.append(forward(**here))
    return _join(outputs)


def _join(outputs: list[Any]) -> Any:
    """Return the last output with the hidden states of all outputs, `[batch, tokens, hidden]`."""
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[-1][1:])
    joined = outputs[-1]
    joined["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], dim=1)
    if joined.get("hidden_states") is not None:
        layers = zip(*(output["hidden_states"] for output in outputs), strict=True)
        joined["hidden_states"] = tuple(torch.cat(parts, dim=1) for parts in layers)
    return joined


def _prepare(
    original: Callable[..., Any],
    evicting: type[Cache],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Check the cache that `generate` was given, before it computes any token.

    It replaces `_prepare_cache_for_generation` of the model. `max_cache_length` includes a prompt that is given as
    embeddings, but not the last token, which is never fed to the model.
    """
    cache = _evicting_cache(model_kwargs, evicting)
    if cache is not None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:  # it crops rejected tokens
            cache.crop(0)
        cache.check_length(max_cache_length + 1)
    return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
