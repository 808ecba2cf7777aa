"""Refusal of gradients through a cache: they would silently be those of the layers after it alone."""

from typing import Any

import torch
from torch import Tensor, nn

from smartkv.errors import SmartKVError


class RefuseBackward(torch.autograd.Function):
    """The identity, whose backward pass raises a SmartKVError."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, cache: str) -> Tensor:
        """Return `tensor`, which then depends on `anchor`, a tensor that requires gradients."""
        ctx.cache = cache
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Raise.

        Raises:
            SmartKVError: always.
        """
        raise SmartKVError(
            f"no gradient flows through the {ctx.cache}: compute a loss without a cache "
            "(training with evicted keys is in docs/eviction_tuning.md)"
        )


def refuse_backward(tensor: Tensor, cache: str) -> Tensor:
    """Return a tensor through which a backward pass raises a SmartKVError that names the cache."""
    anchor = torch.zeros((), device=tensor.device, requires_grad=True)
    return RefuseBackward.apply(tensor, anchor, cache)


def refuse_gradients(output: Any, decoder: nn.Module, inputs: Tensor, cache: str) -> Any:
    """Return a decoder's output, through which no backward pass goes where one could be expected.

    Args:
        output: of the decoder, computed without gradients.
        decoder: the model's decoder.
        inputs: its ids or embeddings.
        cache: name of the cache's class, for the message.
    """
    expected = inputs.requires_grad or any(parameter.requires_grad for parameter in decoder.parameters())
    if not torch.is_grad_enabled() or not expected:
        return output
    if isinstance(output, tuple):
        return (refuse_backward(output[0], cache), *output[1:])
    output["last_hidden_state"] = refuse_backward(output["last_hidden_state"], cache)
    return output
