"""Register an attention function with transformers, and switch a model to it for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.models.architecture import attention_modules


def default_scaling(module: nn.Module, head_dim: int) -> float:
    """Return the factor on the attention scores of a model that passes none to its attention function.

    GPT-2 passes none in transformers 5.2. Its two config flags that change the factor are followed.
    """
    scaling = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scaling /= module.layer_idx + 1  # type: ignore[operator]
    return scaling


class AttentionFunction(Protocol):
    """An attention function that transformers can call in place of a model's own.

    The order of the arguments matters: once kvpress is imported, `dropout` is passed by position.
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
    ) -> tuple[Tensor, None]:
        """Compute the attention of one layer.

        Args:
            module: The attention module. Its `layer_idx` is the layer.
            query: `[batch, query_heads, queries, head_dim]`, after the rotary embedding.
            key: `[batch, kv_heads, keys, head_dim]`, after the rotary embedding.
            value: `[batch, kv_heads, keys, head_dim]`.
            attention_mask: None, because `register_attention` has transformers build no mask.
            dropout: Dropout on the probabilities: 0 in evaluation mode.
            scaling: Factor on the scores. None if the model passes none: use `default_scaling`.
            sliding_window: Most keys that a query of this layer sees, itself included. None for all.
            **kwargs: Further arguments of the model.

        Returns:
            The output `[batch, queries, query_heads, head_dim]`, and None in place of the probabilities.
        """
        ...


def register_attention(name: str, function: AttentionFunction) -> None:
    """Add `function` to transformers' attention implementations.

    Transformers builds no mask for it: the function itself decides which keys each query sees.

    Args:
        name: Name of the implementation, for `model.set_attn_implementation`.
        function: Called in every layer of a model that uses the implementation.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Return None as the mask of an attention function that needs none."""


@contextmanager
def attention_switched_to(model: PreTrainedModel, implementation: str, attribute: str, state: object) -> Iterator[None]:
    """Context manager in which `model` uses a registered attention function.

    An attention function gets no argument of its own, so `state` is set on each attention module, where the function
    reads it. On exit the model is as before, also after an exception.

    Args:
        model: The model to switch.
        implementation: Name that `register_attention` got.
        attribute: Name under which `state` is set on each attention module.
        state: The object that the attention function reads, shared by all layers.
    """
    modules, implementation_before = attention_modules(model), model.config._attn_implementation
    try:
        for module in modules:
            setattr(module, attribute, state)
        model.set_attn_implementation(implementation)
        yield
    finally:
        model.set_attn_implementation(implementation_before)
        for module in modules:
            module.__dict__.pop(attribute, None)
