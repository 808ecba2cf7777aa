"""Attention functions registered with transformers, and the switch that makes a model use one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.models.architecture import attention_modules


def default_scaling(module: nn.Module, head_dim: int) -> float:
    """Factor on the scores where the model hands none over: GPT-2 did not in transformers 5.2, but has flags for it."""
    scaling = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scaling /= module.layer_idx + 1  # type: ignore[operator]
    return scaling


class AttentionFunction(Protocol):
    """What transformers calls in place of a model's own attention. Arguments stand in this order: kvpress, once
    imported, gives `dropout` by position.

    Args:
        module: the attention module, whose `layer_idx` is the layer.
        query: `[batch, query_heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`.
        attention_mask: None, as `register_attention` sees to it.
        dropout: 0 in evaluation mode.
        scaling: factor on the scores; None: the model hands none over, see `default_scaling`.
        sliding_window: keys that a query of this layer sees at most; None: all.

    Returns:
        Output `[batch, queries, query_heads, head_dim]`, and None for the weights.
    """

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]: ...


def register_attention(name: str, function: AttentionFunction) -> None:
    """Make `function` one of transformers' attention implementations.

    No mask is built for it: the function decides itself which keys each query sees.

    Args:
        name: what `model.set_attn_implementation` takes.
        function: called in every layer.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask of an attention function that needs none."""


@contextmanager
def attention_switched_to(model: PreTrainedModel, implementation: str, name: str, thing: Any) -> Iterator[None]:
    """Inside, `model` attends by one of our attention functions, which finds `thing` on its module under `name`.

    The model is as it was on leaving, also after an exception.
    """
    modules, before = attention_modules(model), model.config._attn_implementation
    try:
        for module in modules:
            setattr(module, name, thing)
        model.set_attn_implementation(implementation)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            module.__dict__.pop(name, None)
