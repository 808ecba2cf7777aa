"""Random tensors for the tests of metrics."""

import torch
from torch import Tensor


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
