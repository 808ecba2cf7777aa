"""Register an attention function with transformers, and switch a model to it for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from smartkv.errors import SmartKVError
from smartkv.models.architecture import attention_modules
from smartkv.models.key_sites import KEY_SITES
from smartkv.models.softmax import Softmax
from smartkv.models.wrappers import attention_layer

WITHOUT_EFFECT = frozenset(  # arguments of a model's call that reach attention functions, and mean nothing to them
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "token_type_ids",
        "is_first_iteration",
    }
)


def default_scaling(module: nn.Module, head_dim: int) -> float:
    """Return the factor on the attention scores of a model that passes none to its attention function.

    GPT-2 passes none in transformers 5.2. Its two config flags that change the factor are followed.
    """
    scaling = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scaling /= module.layer_idx + 1  # type: ignore[operator]
    return scaling


class AttentionInputs(NamedTuple):
    """Inputs of one layer's attention in a forward pass.

    Attributes:
        module: The attention module.
        layer: Index of the layer among those with attention.
        query: `[batch, query_heads, queries, head_dim]`, after the rotary embedding.
        key: `[batch, kv_heads, keys, head_dim]`, after the rotary embedding.
        value: `[batch, kv_heads, keys, head_dim]`.
        dropout: Dropout on the probabilities: 0 in evaluation mode.
        softmax: The step from products of queries and keys to probabilities.
        sliding_window: Most keys that a query of this layer sees, itself included. None for all.
    """

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    dropout: float
    softmax: Softmax
    sliding_window: int | None


def register_attention(name: str, attend: Callable[[AttentionInputs], Tensor]) -> None:
    """Add an attention function to transformers' implementations.

    Transformers builds no mask for it: the function itself decides which keys each query sees. A call that asks for
    more than `AttentionInputs` says, such as a bias on the scores or packed sequences, is refused.

    Args:
        name: Name of the implementation, for `model.set_attn_implementation`.
        attend: Called in every layer of a model that uses the implementation. Returns the output
            `[batch, query_heads, queries, head_dim]`.
    """

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,  # the sixth parameter: once imported, kvpress passes it by position
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,  # learned sinks
        **others: Any,
    ) -> tuple[Tensor, None]:
        own = {"softcap": "attn_logit_softcapping", "s_aux": "sinks"}  # what Gemma 2 and GPT-OSS take them from
        foreign = {"softcap": softcap, "s_aux": s_aux}
        _refuse_unknown(name, others | {key: foreign[key] for key in own if not hasattr(module, own[key])})
        scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
        layer = attention_layer(module)
        if sliding_window is None:
            sliding_window = KEY_SITES[module.config.model_type].own_window(module)  # type: ignore[union-attr, index]
        softmax = Softmax(scaling, softcap, s_aux)
        output = attend(AttentionInputs(module, layer, query, key, value, dropout, softmax, sliding_window))
        return output.transpose(1, 2).contiguous(), None  # no probabilities

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _no_mask)


def _refuse_unknown(name: str, others: dict[str, Any]) -> None:
    """Refuse arguments that would change what attention is."""
    unknown = {key for key, value in others.items() if value is not None and key not in WITHOUT_EFFECT}
    if others.get("is_causal") is True:
        unknown.discard("is_causal")
    if unknown:
        raise SmartKVError(
            f"attention with {', '.join(sorted(unknown))} is not supported by '{name}': leave "
            f"{'it' if len(unknown) == 1 else 'them'} out, or use the model without SmartKV"
        )


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
