"""Forward hooks that read each layer's pre-RoPE keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smartkv.models.architecture import KEY_SITES, attention_modules


def key_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the module of each layer whose output holds the pre-RoPE keys, in order."""
    site = KEY_SITES[model.config.model_type]
    return [module.get_submodule(site.module) for module in attention_modules(model)]


def register_key_hooks(model: PreTrainedModel, on_keys: Callable[[nn.Module, Tensor], None]) -> list[RemovableHandle]:
    """Call `on_keys` with the pre-RoPE keys of each layer in every forward pass.

    Args:
        model: A model of a supported family.
        on_keys: Called as `on_keys(attention module, keys)` with keys `[batch, kv_heads, tokens, head_dim]`.

    Returns:
        One handle a layer. Removing the handles ends the calls.
    """
    site = KEY_SITES[model.config.model_type]
    return [
        # A partial and not a closure: copy.deepcopy of the model copies its arguments too, the module among them.
        key_module.register_forward_hook(partial(_hand_over, on_keys, site.read, module))
        for key_module, module in zip(key_modules(model), attention_modules(model), strict=True)
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
        model: A model of a supported family. Its head is not run.
        tokens: Token ids `[tokens]`.

    Returns:
        The keys of each layer, `[1, kv_heads, tokens, head_dim]` in the model's dtype.
    """
    keys_by_layer: list[Tensor] = []
    with hook_keys(model, lambda _, keys: keys_by_layer.append(keys)):
        model.base_model(input_ids=tokens.long().to(model.device)[None], use_cache=False)
    return keys_by_layer
