"""Attention functions registered with transformers, and the switch that makes a model use one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from smartkv.models.architecture import attention_modules


def default_scaling(module: nn.Module, head_dim: int) -> float:
    """Factor on the scores where the model hands none over: GPT-2 did not in transformers 5.2, but has flags for it."""
    scaling = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scaling /= module.layer_idx + 1  # type: ignore[operator]
    return scaling


def no_mask(*_: Any, **__: Any) -> None:
    """Causality is computed in `attention_blocks`; no mask is built."""


@contextmanager
def attending(model: PreTrainedModel, implementation: str, name: str, thing: Any) -> Iterator[None]:
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
