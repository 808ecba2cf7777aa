"""Forward hooks that read each layer's pre-RoPE keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smartkv.models.architecture import KEY_SITES, attention_modules


def register_key_hooks(model: PreTrainedModel, on_keys: Callable[[nn.Module, Tensor], None]) -> list[RemovableHandle]:
    """From now on each layer's attention module hands its keys before the rotary embedding,
    `[batch, kv_heads, tokens, head_dim]`, to `on_keys(module, keys)`, until the handles returned are removed."""
    site = KEY_SITES[model.config.model_type]
    return [
        # no closure: in a copy of the model the hook speaks of the copy
        module.get_submodule(site.module).register_forward_hook(partial(_hand_over, on_keys, site.read, module))
        for module in attention_modules(model)
    ]


def _hand_over(
    on_keys: Callable[[nn.Module, Tensor], None],
    read: Callable[[Tensor, nn.Module], Tensor],
    module: nn.Module,
    _: nn.Module,
    __: Any,
    output: Tensor,
) -> None:
    """The hook: `output` is that of the submodule where `module` has its keys."""
    on_keys(module, read(output, module))


@contextmanager
def hook_keys(model: PreTrainedModel, on_keys: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """`register_key_hooks` for the time inside."""
    handles = register_key_hooks(model, on_keys)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_keys(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The keys before the rotary embedding of one window (ids `[tokens]`) under a full cache: of each layer
    `[1, kv_heads, tokens, head_dim]`, the model's dtype."""
    found: list[Tensor] = []
    with hook_keys(model, lambda _, keys: found.append(keys)):
        model.base_model(input_ids=tokens.long().to(model.device)[None], use_cache=False)
    return found
