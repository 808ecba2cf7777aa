"""Arguments of a call with an evicting cache: of a decoder's forward, and of `generate`.

What an evicting cache cannot do is refused before any token is computed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.generation import GenerationMode

from smartkv.errors import SmartKVError

CACHE_NAMES = ("past_key_values", "cache")  # of a decoder's argument: before transformers 5.24, and since
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "token_type_ids")
USUAL_CANDIDATES = 20  # of an assistant in transformers, where nobody says another number
DROPOUTS = ("attention_dropout", "attn_pdrop")  # in a config: Llama, Qwen, Mistral; GPT-2


def evicting_cache(kwargs: dict[str, Any], evicting: type[Cache]) -> Any:
    """Return the cache among a call's arguments if it is of the class `evicting`; else None."""
    caches = (kwargs.get(name) for name in CACHE_NAMES)
    return next((cache for cache in caches if isinstance(cache, evicting)), None)


def tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """Return a call's tokens: ids `[batch, tokens]`, or embeddings `[batch, tokens, hidden]`.

    Raises:
        SmartKVError: there are none, or they have another shape.
    """
    inputs = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if inputs is None:
        raise SmartKVError("the model was given neither input_ids nor inputs_embeds")
    if inputs.dim() < 2 or not inputs.shape[1]:
        raise SmartKVError(
            f"the model takes input_ids [batch, tokens], got {tuple(inputs.shape)}: at least one token of one row"
        )
    return inputs


def columns(value: Any, start: int, stop: int) -> Any:
    """Return the tokens from `start` to `stop` of one of a decoder's `TOKEN_INPUTS`."""
    if not isinstance(value, Tensor):
        return value
    return value[start:stop] if value.dim() == 1 else value[:, start:stop]


def no_mask(inputs: Tensor) -> Tensor:
    """Return a mask for which a decoder builds none: transformers passes 4-D masks through as they are."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)


def check_options(decoder: nn.Module, kwargs: dict[str, Any], cache: Any) -> None:
    """Refuse options of a forward pass that an evicting cache would not honour.

    Raises:
        SmartKVError: the cache shall not be used, attention weights or router logits are asked for, or attention has
            dropout.
    """
    config, name = decoder.config, type(cache).__name__
    if kwargs.get("use_cache") is False:
        raise SmartKVError(f"use_cache=False was given together with the {name}, which is always used: leave one out")
    output_attentions = kwargs.get("output_attentions")
    if getattr(config, "output_attentions", False) if output_attentions is None else output_attentions:
        raise SmartKVError(f"output_attentions=True cannot be given with the {name}, which keeps no attention weights")
    if kwargs.get("output_router_logits"):  # a long prompt is read in chunks, and only the last would be reported
        raise SmartKVError(f"output_router_logits=True cannot be given with the {name}: leave it out")
    dropout = next((value for field in DROPOUTS if (value := getattr(config, field, None))), 0)
    if decoder.training and dropout:
        raise SmartKVError(f"the model is in training mode with attention dropout {dropout}: call model.eval()")


def prepare_cache(
    original: Callable[..., Any],
    evicting: type[Cache],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Check the cache that `generate` was given.

    It replaces `_prepare_cache_for_generation` of the model. `max_cache_length` includes a prompt that is given as
    embeddings, but not the last token, which is never fed to the model.

    Raises:
        SmartKVError: `generate` is to go back, to do without the cache, or to write more tokens than the model has
            positions.
    """
    cache = evicting_cache(model_kwargs, evicting)
    if cache is not None:
        if generation_config.use_cache is False:
            raise SmartKVError(f"use_cache=False was given together with the {type(cache).__name__}: leave one out")
        if generation_mode == GenerationMode.ASSISTED_GENERATION:  # it crops rejected tokens
            candidates = (generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens)
            cache.check_can_go_back(next((number for number in candidates if number), USUAL_CANDIDATES))
        tokens, answer = max_cache_length + 1, generation_config.max_new_tokens
        cache.check_answer(None if answer is None else tokens - answer, tokens)
    return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def generate(original: Callable[..., Any], evicting: type[Cache], *args: Any, **kwargs: Any) -> Any:
    """Check that a prompt goes on from what its cache holds, and keep other threads from using the cache meanwhile.

    It replaces `generate` of the model.

    Raises:
        SmartKVError: see `SeenTokens.check_prompt`; or another thread uses the cache.
    """
    cache = evicting_cache(kwargs, evicting)
    if cache is None:
        return original(*args, **kwargs)
    ids = args[0] if args else next((kwargs[n] for n in ("inputs", "input_ids") if kwargs.get(n) is not None), None)
    prompt, mask = kwargs.get("inputs_embeds", ids), kwargs.get("attention_mask")
    with cache.in_use():
        cache.check_whole()
        cache.seen_tokens.keep(cache.get_seq_length())
        if isinstance(prompt, Tensor) and prompt.dim() >= 2:
            whole = not isinstance(mask, Tensor) or mask.shape[-1] <= prompt.shape[1]  # else ids are new tokens alone
            if whole:
                cache.seen_tokens.check_prompt(prompt, cache.model.get_input_embeddings())
        try:
            return original(*args, **kwargs)
        finally:
            cache.planned_columns = cache.prompt_columns = None


def refuse_batches(original: Callable[..., Any], evicting: type[Cache], *args: Any, **kwargs: Any) -> Any:
    """Refuse a cache that continuous batching would ignore. It replaces `generate_batch` of the model.

    Raises:
        SmartKVError: an evicting cache was given.
    """
    cache = evicting_cache(kwargs, evicting)
    if cache is not None:
        raise SmartKVError(
            f"generate_batch has a paged cache of its own and would ignore the {type(cache).__name__}: "
            "call model.generate with a padded batch"
        )
    return original(*args, **kwargs)
