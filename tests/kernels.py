"""Counts what a GPU would be asked to start, and what it would be waited for, while operations run on the CPU."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

_NO_KERNEL = (
    "to reshape contiguous chunk narrow view _unsafe_view expand transpose permute unsqueeze squeeze select slice "
    "split split_with_sizes unbind t detach alias as_strided reshape_alias _reshape_alias unflatten numpy_T diagonal "
    "lift_fresh scalar_tensor empty empty_like new_empty empty_strided new_empty_strided"
)
VIEWS = frozenset(_NO_KERNEL.split())  # operations that start no kernel
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"}


class Kernels(TorchDispatchMode):
    """Counts the operations inside the context that start a kernel, and those for whose result the host waits.

    Attributes:
        started: by name.
        waited: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started, self.waited = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = op.overloadpacket.__name__, kwargs or {}
        if name not in VIEWS:
            self.started[name] += 1
        if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waited[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.waited[f"{name} by a mask"] += 1
        return op(*args, **kwargs)


def a_layer(
    build: Callable[[int], PreTrainedModel], prepare: Callable[[PreTrainedModel], Callable[[], Any]]
) -> Kernels:
    """Count what a layer adds: the difference between models of two layers and of one.

    Args:
        build: makes a model of so many layers.
        prepare: makes what is counted, for a model.
    """
    counts = []
    for layers in (1, 2):
        with torch.inference_mode():
            call = prepare(build(layers))
            with Kernels() as kernels:
                call()
        counts.append(kernels)
    one, two = counts
    one.started, one.waited = two.started - one.started, two.waited - one.waited
    return one
