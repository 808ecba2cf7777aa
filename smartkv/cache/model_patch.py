"""Patches a model so that it takes an evicting cache as `past_key_values`.

`patch_model` replaces the forward of a model's decoder. Called with an evicting cache, the new forward lets the calling
thread attend through that cache (see `smartkv.cache.forward_pass`), and feeds it the tokens in chunks, so that no layer
ever holds the keys of a whole prompt. Called with anything else, it calls the forward that it replaced.

Any thread may patch a model, use it and let a cache die. What somebody else puts on the model, before or meanwhile,
stays.
"""

import functools
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from smartkv.cache.call_arguments import (
    TOKEN_INPUTS,
    check_options,
    columns,
    evicting_cache,
    generate,
    no_mask,
    prepare_cache,
    refuse_batches,
    tokens_of,
)
from smartkv.cache.forward_pass import AttendingCache, ForwardPass, PassConfig, current_pass, in_pass
from smartkv.cache.no_gradients import refuse_gradients
from smartkv.cache.seen_tokens import SeenTokens
from smartkv.cache.uncompiled import not_compiling, uncompiled
from smartkv.errors import SmartKVError
from smartkv.models.architecture import attention_modules
from smartkv.models.key_hooks import key_modules, register_key_hooks
from smartkv.models.key_sites import KEY_SITES
from smartkv.models.layer_ranges import format_layers
from smartkv.models.wrappers import decoder_of, linear_attention_modules

_SESSION = "_smartkv_session"


class EvictingCache(AttendingCache, Protocol):
    """Interface of the caches that a patched model takes."""

    seen_tokens: SeenTokens

    def interruption_noted(self) -> AbstractContextManager[None]:
        """Note inside the context whether an exception leaves only some of a pass's tokens in the cache."""

    def in_use(self) -> AbstractContextManager[None]:
        """Keep other threads from using the cache inside the context."""

    def chunk_of_call(self, tokens: int) -> int:
        """Return how many of a call's tokens go through the decoder together."""

    def check_call(self, decoder: nn.Module, tokens: int) -> None:
        """Raise if a forward pass of `decoder` over `tokens` tokens is not possible."""

    def begin_call(self, tokens: int, real: Tensor | None, rows: int) -> None:
        """Prepare for a call that has been checked."""


class _Absent:
    """In place of an attribute that an object does not have. It is a class, because a class survives a deep copy."""


class InstancePatch:
    """An attribute of an object that is replaced until `undo`.

    Args:
        owner: the object.
        name: of the attribute.
        value: its new value.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.before = owner.__dict__.get(name, _Absent)  # of the object itself and not of its class
        owner.__dict__[name] = value

    def undo(self) -> None:
        """Restore the attribute, unless somebody else has replaced it meanwhile."""
        if self.owner.__dict__.get(self.name) is not self.value:
            return
        if self.before is _Absent:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.before


class Session:
    """The replacement of a decoder's forward.

    A model has one session for all caches that are attached to it. The session refers to the model's modules by
    attributes and not in closures, so a deep copy of the model gets a session with the copy's modules.

    Attributes:
        original_forward: the forward that it replaced.
        users: number of attached caches and of forward passes on one. Without a user, the model is as it was.
        active: whether the model is patched. The compiler reads it and compiles anew when it changes, unlike `users`.
    """

    def __init__(self, model: PreTrainedModel, evicting: type[Cache]) -> None:
        self.decoder, self.evicting, self.users, self.active = decoder_of(model), evicting, 0, True
        self.original_forward: Callable[..., Any] = self.decoder.forward
        functools.update_wrapper(self, self.original_forward, updated=())  # some callers read a forward's signature
        self.model = model
        self._patch_layers()
        self.patches = [InstancePatch(self.decoder, _SESSION, self), InstancePatch(self.decoder, "forward", self)]
        wrappers = {
            "_prepare_cache_for_generation": prepare_cache,
            "generate": generate,
            "generate_batch": refuse_batches,
        }
        for name, wrapper in wrappers.items():
            original = getattr(model, name, None)
            if original is not None:  # a partial and not a closure: a deep copy of the model copies its arguments
                patched = functools.update_wrapper(functools.partial(wrapper, original, evicting), original, updated=())
                self.patches.append(InstancePatch(model, name, patched))

    def undo(self) -> None:
        """Restore the model."""
        self.active = False
        self._restore_layers()
        for patch in reversed(self.patches):
            patch.undo()

    def _patch_layers(self) -> None:
        """Let each layer's attention follow the pass of its thread, and read its pre-RoPE keys."""
        modules = attention_modules(self.model)
        views = {id(m.config): PassConfig(m.config, self.decoder) for m in modules}
        self.modules = self._modules()
        self.handles = register_key_hooks(self.model, self.on_keys)
        for module in linear_attention_modules(self.model):
            self.handles.append(module.register_forward_pre_hook(self.give_padding, with_kwargs=True))
        self.layer_patches = [InstancePatch(module, "config", views[id(module.config)]) for module in modules]

    def _modules(self) -> list[nn.Module]:
        """Return the modules that are patched or hooked."""
        linear = linear_attention_modules(self.model)
        return [*attention_modules(self.model), *key_modules(self.model), *linear]

    def _restore_layers(self) -> None:
        for handle in self.handles:
            handle.remove()
        for patch in reversed(self.layer_patches):
            patch.undo()

    def follow_layers(self) -> None:
        """Patch the layers that the model has now: an adapter or another layer may have taken the place of one."""
        here = self._modules()
        if len(here) == len(self.modules) and all(map(operator.is_, here, self.modules)):
            return
        with _lock:
            self._restore_layers()
            self._patch_layers()

    def on_keys(self, module: nn.Module, keys: Tensor) -> None:
        """Keep a layer's pre-RoPE keys for its attention, during a pass of this thread through this decoder."""
        forward_pass = current_pass()
        if forward_pass is not None and forward_pass.decoder is self.decoder:
            forward_pass.keys[module] = keys

    def give_padding(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Tell linear attention which tokens are padding: the mask that says so did not go through the decoder."""
        forward_pass = current_pass()
        if forward_pass is None or forward_pass.decoder is not self.decoder or forward_pass.real is None:
            return None
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, kwargs | {"attention_mask": forward_pass.real.to(hidden.device)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __reduce__(self) -> Any:
        raise SmartKVError(
            "a model cannot be pickled while a cache is attached to it: call cache.detach() first, "
            "or write it with model.save_pretrained"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder, through its evicting cache if it was given one."""
        if not torch.compiler.is_compiling():
            _restore_unused()  # this model too, if its last cache died while something was compiled
        if not self.active:  # somebody's patch still calls it, after the last cache has died
            return self.original_forward(*args, **kwargs)
        cache: EvictingCache | None = evicting_cache(kwargs, self.evicting)
        if cache is None:
            if any(isinstance(value, self.evicting) for value in args):
                raise SmartKVError("give the cache by name: model(ids, past_key_values=cache)")
            with nullcontext() if current_pass() is None else in_pass(None):
                return self.original_forward(*args, **kwargs)
        if len(args) > 1:
            raise SmartKVError(
                f"with a {type(cache).__name__} only input_ids may be given by position: give other arguments by name"
            )
        if args:  # the first argument of every family's decoder
            kwargs["input_ids"] = args[0]
        return self._run_uncompiled(cache, kwargs)

    @torch.compiler.disable
    def _run_uncompiled(self, cache: EvictingCache, kwargs: dict[str, Any]) -> Any:
        """Run the decoder on an evicting cache."""
        inputs = tokens_of(kwargs)
        check_options(self.decoder, kwargs, cache)
        with _used(self), cache.in_use(), uncompiled():
            cache.check_call(self.decoder, inputs.shape[1])
            real = cache.seen_tokens.check_mask(kwargs.get("attention_mask"), inputs)
            cache.begin_call(inputs.shape[1], real, len(inputs))
            with cache.interruption_noted():
                self.follow_layers()
                if KEY_SITES[self.model.config.model_type].positions_of_mask and kwargs.get("position_ids") is None:
                    kwargs["position_ids"] = cache.seen_tokens.positions(inputs, real)
                kwargs["attention_mask"] = no_mask(inputs)  # `real` holds its content
                # the cache may be changed later outside `torch.inference_mode`, so its tensors are not created in it
                with torch.inference_mode(False), torch.no_grad():
                    output = self._attend(cache, kwargs, inputs, real)
        return refuse_gradients(output, self.decoder, inputs, type(cache).__name__)

    def _attend(self, cache: EvictingCache, kwargs: dict[str, Any], inputs: Tensor, real: Tensor | None) -> Any:
        """Run a forward pass in which the cache attends, some tokens at a time, and join the outputs."""
        forward_pass = ForwardPass(self.decoder, cache)
        tokens, chunk, outputs = inputs.shape[1], cache.chunk_of_call(inputs.shape[1]), []
        for start in range(0, tokens, chunk):
            here = dict(kwargs)
            if tokens > chunk:
                stop = min(start + chunk, tokens)
                here |= {name: columns(kwargs[name], start, stop) for name in TOKEN_INPUTS if name in kwargs}
            own = None if real is None else real[:, start : start + chunk]
            forward_pass.real = None if own is None or bool(own.all()) else own
            cache.seen_tokens.append(inputs[:, start : start + chunk], forward_pass.real)
            forward_pass.attended.clear()
            with in_pass(forward_pass):
                outputs.append(self.original_forward(**here))
            if missing := sorted(set(range(len(self.layer_patches))) - forward_pass.attended):
                raise SmartKVError(
                    f"the attention of layers {format_layers(missing)} did not go through the {type(cache).__name__}: "
                    "something replaced it in the model's layers; call cache.reset(), and use the model without that"
                )
        return outputs[0] if len(outputs) == 1 else _join(outputs)


# -- patching ---------------------------------------------------------------------------------------------------------

_lock = threading.Lock()  # held while a model is patched or restored
_left: deque[Session] = deque()  # sessions that lost a user, one entry for each


def patch_model(model: PreTrainedModel, evicting: type[Cache]) -> Callable[[], None]:
    """Let `model` take caches of the class `evicting` as `past_key_values`.

    Args:
        model: a causal LM of a supported family.
        evicting: a class whose instances are `EvictingCache`s.

    Returns:
        Function that undoes this call. The model is restored when all calls are undone. A second call of the function
        does nothing.
    """
    with _lock:
        session: Session | None = decoder_of(model).__dict__.get(_SESSION)
        if session is not None:
            session.users += 1
    if session is None:
        with not_compiling(wait=True), _lock:
            session = decoder_of(model).__dict__.get(_SESSION) or Session(model, evicting)
            session.users += 1
    _restore_unused()
    once = iter([session])

    def undo() -> None:
        for used in once:
            _leave(used)

    return undo


def is_evicting(model: PreTrainedModel, cache: AttendingCache) -> bool:
    """Return whether this thread is in a forward pass of `model` on `cache`."""
    forward_pass = current_pass()
    return forward_pass is not None and forward_pass.cache is cache and forward_pass.decoder is decoder_of(model)


@contextmanager
def _used(session: Session) -> Iterator[None]:
    """Keep a model patched inside the context, also if its last cache is detached meanwhile."""
    with _lock:
        session.users += 1
    try:
        yield
    finally:
        _leave(session)


def _leave(session: Session) -> None:
    """Count one user less. It may be called at any point of any thread, by the garbage collector too."""
    _left.append(session)
    _restore_unused()


def _restore_unused() -> None:
    """Restore the models whose last user has left.

    Nobody waits for the lock here, because its holder may be this very thread, interrupted by the garbage collector.
    Whoever holds it comes by here after releasing it. While something is compiled, the models wait for a later call.
    """
    compiling = False
    while _left and not compiling and _lock.acquire(blocking=False):
        try:
            with not_compiling(wait=False) as at_rest:
                compiling = not at_rest
                while _left and at_rest:
                    session = _left.popleft()
                    session.users -= 1
                    if not session.users:
                        session.undo()
        finally:
            _lock.release()


# -- a call -----------------------------------------------------------------------------------------------------------


def _join(outputs: list[Any]) -> Any:
    """Return the last output with the hidden states of all outputs, `[batch, tokens, hidden]`."""
    if isinstance(outputs[0], tuple):  # return_dict=False; the hidden states of all layers are a tuple in it
        last, *others = zip(*outputs, strict=True)
        return (torch.cat(last, dim=1), *(_join_layers(e) if isinstance(e[0], tuple) else e[-1] for e in others))
    joined = outputs[-1]
    joined["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], dim=1)
    if joined.get("hidden_states") is not None:
        joined["hidden_states"] = _join_layers([output["hidden_states"] for output in outputs])
    return joined


def _join_layers(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join the hidden states of each layer, `[batch, tokens, hidden]`, over the parts of a call."""
    return tuple(torch.cat(layer, dim=1) for layer in zip(*parts, strict=True))
