"""The losses of many gates and their gradients, some gates at a time.

What a part leaves stays in the processor's cache, and the memory that it used is there for the next.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from smartkv.gates.bank import GateBank

Predict = Callable[[Tensor], Tensor]


def in_chunks(bank: GateBank, losses: Callable[[Predict, slice], Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Forward and backward pass, `size` gates at a time.

    Args:
        losses: (these gates' forward with keys `[size, rows, head_dim]`, which they are) -> `[size, rows]`. A gate's
            losses depend on that gate alone.

    Returns:
        `[gates, rows]`, detached, and their sum, a scalar. In more than one part its backward pass costs nothing: it is
        linear in the weights, and hands out the gradients that are known already, to optimisers and to DDP.
    """
    if size >= len(bank):
        rows = losses(bank, slice(None))
        return rows.detach(), rows.sum()
    weights = dict(bank.named_parameters())
    found, gradients = [], []
    for start in range(0, len(bank), size):
        here = slice(start, start + size)
        part = {name: weight.detach()[here].requires_grad_() for name, weight in weights.items()}
        rows = losses(partial(functional_call, bank, part), here)
        gradients.append(torch.autograd.grad(rows.sum(), list(part.values())))
        found.append(rows.detach())
    together = torch.cat(found)
    known = zip(weights.values(), (torch.cat(g) for g in zip(*gradients, strict=True)), strict=True)
    linear = torch.stack([(weight * gradient).sum() for weight, gradient in known]).sum()
    return together, together.sum() + linear - linear.detach()
