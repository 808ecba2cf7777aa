"""A hash of one module's weights, in whatever form they are stored."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from smartkv.models.wrappers import weights_loaded

SIGNED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)


def weight_hash(projection: nn.Module) -> str:
    """Return 16 hexadecimal digits of a SHA-256 over the weights of a linear module.

    Rounding to another dtype changes no sign, so plain weights are told by their signs: the hash is the same in every
    dtype. Packed weights (GPTQ, AWQ, torchao, bitsandbytes in 4 bits, torch's int8) are told by all that the module
    stores. An adapter's own weights do not count.

    Returns:
        The digits; "" if the weights are not there, as on the device `meta`.
    """
    while isinstance(inner := getattr(projection, "base_layer", None), nn.Module):  # an adapter of peft
        projection = inner
    with torch.inference_mode(False), weights_loaded(projection):  # torchao's tensors cannot be read in that mode
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype in SIGNED and not hasattr(weight, "__tensor_flatten__"):
            if weight.is_meta:
                return ""
            content = numpy.packbits(weight.detach().signbit().cpu().numpy()).tobytes()
        else:
            tensors = list(_tensors(list(projection.state_dict().values())))
            if not tensors or any(tensor.is_meta for tensor in tensors):
                return ""
            content = b"".join(_bytes(tensor) for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a value of a state dict."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # torchao: a tensor made of others
        yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor):
        yield value.int_repr() if value.is_quantized else value


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
