"""Models as people hold them: inside wrappers, with offloaded weights, with layers on several devices.

A PeftModel, a value head, `torch.compile` or DataParallel holds the transformers model as a submodule. accelerate keeps
offloaded weights on the device `meta` between calls, and its hooks know on which device a module computes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError

LINEAR_ATTENTION = "linear_attention"  # the kind of a layer that stores no keys


def decoder_of(model: nn.Module) -> Any:
    """Return the module that runs the blocks of a model, and that its head calls."""
    base: Any = getattr(model, "base_model", None)
    return getattr(base, "decoder", base)  # OPT; every other family


def decoder_blocks(model: nn.Module) -> Any:
    """Return the blocks of a model's decoder, one per layer; None if it has none."""
    decoder = decoder_of(model)
    return getattr(decoder, "h", None) or getattr(decoder, "layers", None)  # GPT-2; every other family


def attention_blocks(model: nn.Module) -> list[Any]:
    """Return the blocks of a model's decoder that have attention; blocks with linear attention store no keys."""
    return [block for block in decoder_blocks(model) if not hasattr(block, "linear_attn")]


def linear_attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of linear attention of a hybrid model, in order."""
    return [block.linear_attn for block in decoder_blocks(model) if hasattr(block, "linear_attn")]


def attention_layer(module: Any) -> int:
    """Return the index of an attention module among those of its model: layers with linear attention do not count."""
    layer: int = module.layer_idx
    kinds = getattr(module.config, "layer_types", None) or ()
    return layer - sum(kind == LINEAR_ATTENTION for kind in kinds[:layer])


def self_attention(block: Any) -> nn.Module:
    """Return the self-attention module of a decoder block."""
    names = ("attn", "attention", "self_attn")  # GPT-2; GPT-NeoX; every other family
    module: nn.Module = next(getattr(block, name) for name in names if hasattr(block, name))
    return module


def language_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model that a module is, or that it wraps.

    Args:
        model: A causal LM, or a module around one: a PeftModel, a value head, a compiled or parallel model.

    Raises:
        SmartKVError: There is no such model or several, or an adapter that puts tokens of its own into the cache.
    """
    if isinstance(model, PreTrainedModel) and decoder_blocks(model) is not None:
        return model
    found = {id(each): each for each in _language_models(model)}
    if len(found) != 1:
        names = ", ".join(type(each).__name__ for each in found.values())
        raise SmartKVError(
            f"expected a transformers model or a wrapper of one, got a {type(model).__name__} that holds "
            f"{f'{len(found)} of them ({names}): give one of these' if found else 'none'}"
        )
    return next(iter(found.values()))


def _language_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the outermost models with a decoder in a module."""
    if isinstance(module, PreTrainedModel) and decoder_blocks(module) is not None:
        yield module
        return
    config: Any = getattr(module, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise SmartKVError(
            f"adapters of type {config.peft_type.value} are not supported: they put tokens of their own into the "
            "cache, which it would take for the prompt's; use one that changes weights, such as LoRA"
        )
    for child in module.children():
        yield from _language_models(child)


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model takes token ids."""
    lm = language_model(model)
    return _device(lm.get_input_embeddings()) or lm.device


def key_devices(model: nn.Module) -> list[torch.device]:
    """Return the device on which each layer with attention computes its keys, also where its weights are offloaded."""
    lm = language_model(model)
    return [_device(block) or lm.device for block in attention_blocks(lm)]


def weights_loaded(module: nn.Module) -> AbstractContextManager[None]:
    """Context manager in which the offloaded weights of a module are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _device(module: nn.Module | None) -> torch.device | None:
    """Return the device on which a module computes; None if neither weights nor hooks tell."""
    if module is None:
        return None
    for part in module.modules():  # accelerate's hook comes first: offloaded weights are on `meta`
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.empty(0, device=device).device  # with its index
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)
