"""A model's forward pass, when it is handed a cache that feeds itself.

`follow_cache` puts a forward of its own on the decoder. Called with an evicting cache it attaches the attention
function for that pass alone and feeds the tokens in pieces, so that no layer ever holds the keys of a whole prompt;
called with anything else it does what it did before.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from smartkv.attention import attach_eviction
from smartkv.errors import SmartKVError

_FOLLOWERS = "_smartkv_followers"  # how many caches need the forward of ours, on the decoder
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "token_type_ids")


def follow_cache(model: PreTrainedModel, evicting: type[Cache]) -> Callable[[], None]:
    """From now on `model` takes caches of class `evicting` (which have a `chunk`) as `past_key_values`.

    Returns:
        What undoes it; the model is as it was when every follower has done so. Calling it twice does no harm.
    """
    decoder = model.base_model
    if not decoder.__dict__.get(_FOLLOWERS):
        plain = decoder.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, evicting):
                if any(isinstance(value, evicting) for value in args):
                    raise SmartKVError("hand the cache over by name: model(ids, past_key_values=cache)")
                return plain(*args, **kwargs)
            with attach_eviction(model):
                return _in_chunks(plain, args, kwargs, cache)

        decoder.__dict__["forward"] = forward
    decoder.__dict__[_FOLLOWERS] = decoder.__dict__.get(_FOLLOWERS, 0) + 1
    undone = False

    def undo() -> None:
        nonlocal undone
        if undone:
            return
        undone = True
        decoder.__dict__[_FOLLOWERS] -= 1
        if not decoder.__dict__[_FOLLOWERS]:
            del decoder.__dict__[_FOLLOWERS], decoder.__dict__["forward"]

    return undo


def _in_chunks(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any) -> Any:
    """One forward pass, `cache.chunk` tokens at a time; outputs are put together again."""
    if args:  # `input_ids` is the first argument of every family's decoder
        kwargs = {"input_ids": args[0], **kwargs}
    given = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if len(args) > 1 or given is None or given.shape[1] <= cache.chunk:
        return plain(**kwargs) if len(args) <= 1 else plain(*args, **{k: kwargs[k] for k in kwargs if k != "input_ids"})
    tokens, mask = given.shape[1], kwargs.get("attention_mask")
    outputs = []
    for start in range(0, tokens, cache.chunk):
        stop = min(start + cache.chunk, tokens)
        here = dict(kwargs)
        for name in TOKEN_INPUTS:
            value = kwargs.get(name)
            if isinstance(value, Tensor):
                here[name] = value[start:stop] if value.dim() == 1 else value[:, start:stop]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            here["attention_mask"] = mask[:, : mask.shape[1] - tokens + stop]
        outputs.append(plain(**here))
    return _joined(outputs)


def _joined(outputs: list[Any]) -> Any:
    """The first output with the hidden states of all: `[batch, tokens, hidden]`."""
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[-1][1:])
    whole = outputs[-1]
    whole["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], dim=1)
    if whole.get("hidden_states") is not None:
        layers = zip(*(output["hidden_states"] for output in outputs), strict=True)
        whole["hidden_states"] = tuple(torch.cat(parts, dim=1) for parts in layers)
    return whole
