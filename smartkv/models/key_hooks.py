"""Forward hooks that read each layer's pre-RoPE keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture, attention_modules
from smartkv.models.key_sites import KEY_SITES
from smartkv.models.wrappers import input_device, language_model


def key_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the module of each layer whose output holds the pre-RoPE keys, in order.

    Raises:
        SmartKVError: The model's family is not supported, or a layer has no such module.
    """
    lm = language_model(model)
    family, found = KEY_SITES[Architecture.of(lm.config).model_type], []
    for layer, module in enumerate(attention_modules(lm)):
        site = family.of(module)
        if not hasattr(module, site.module):
            raise SmartKVError(
                f"layer {layer} of this {type(lm).__name__} has no module {site.module}, whose output is the pre-RoPE "
                "key: load the model without fused or replaced attention modules"
            )
        found.append(module.get_submodule(site.module))
    return found


def register_key_hooks(model: PreTrainedModel, on_keys: Callable[[nn.Module, Tensor], None]) -> list[RemovableHandle]:
    """Call `on_keys` with the pre-RoPE keys of each layer in every forward pass.

    Args:
        model: A model of a supported family.
        on_keys: Called as `on_keys(attention module, keys)` with keys `[batch, kv_heads, tokens, head_dim]`.

    Returns:
        One handle a layer. Removing the handles ends the calls.

    Raises:
        SmartKVError: The model's family is not supported, or a layer has no module that gives its keys.
    """
    lm = language_model(model)
    site, modules = KEY_SITES[lm.config.model_type], attention_modules(lm)
    return [
        # A partial and not a closure: copy.deepcopy of the model copies its arguments too, the module among them.
        key_module.register_forward_hook(partial(_hand_over, on_keys, site.of(module).read, module))
        for key_module, module in zip(key_modules(lm), modules, strict=True)
    ]


def _hand_over(
    on_keys: Callable[[nn.Module, Tensor], None],
    read: Callable[[Tensor, nn.Module], Tensor],
    module: nn.Module,
    _: nn.Module,
    __: Any,
    output: Tensor,
) -> None:
    """Forward hook on the submodule whose `output` holds the keys of the attention module `module`."""
    on_keys(module, read(output, module))


@contextmanager
def hook_keys(model: PreTrainedModel, on_keys: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Context manager in which `register_key_hooks` holds; the arguments are the same."""
    handles = register_key_hooks(model, on_keys)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_keys(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """Read the pre-RoPE keys of one window in a forward pass without a cache.

    Args:
        model: A model of a supported family, or a wrapper of one. Its head is not run.
        tokens: Token ids `[tokens]`.

    Returns:
        The keys of each layer, `[1, kv_heads, tokens, head_dim]` in the model's dtype.
    """
    keys_by_layer: list[Tensor] = []
    with hook_keys(model, lambda _, keys: keys_by_layer.append(keys)):
        ids = tokens.long().to(input_device(model))[None]
        language_model(model).base_model(input_ids=ids, use_cache=False)
    return keys_by_layer
