"""Losses and gradients of many gates, computed for a few gates at a time.

The activations of a few gates fit the processor's cache, and each chunk reuses the memory of the one before.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from smartkv.gates.bank import GateBank

Predict = Callable[[Tensor], Tensor]


def in_chunks(bank: GateBank, losses: Callable[[Predict, slice], Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Compute losses and gradients for `size` gates at a time.

    Args:
        bank: all gates.
        losses: function of (predict, chunk) that returns the losses `[size, rows]`. `predict` is the forward pass of
            the chunk's gates on keys `[size, rows, head_dim]`, and `chunk` is their slice of the bank. The losses of a
            gate must depend on that gate alone.
        size: gates per chunk.

    Returns:
        The losses `[gates, rows]`, detached, and their sum, a scalar to call `backward` on. With several chunks the
        gradients are computed here; the scalar is a linear function of the weights that has the same gradients, so that
        its backward pass is cheap and DDP's hooks run as usual.
    """
    if size >= len(bank):
        rows = losses(bank, slice(None))
        return rows.detach(), rows.sum()
    weights = dict(bank.named_parameters())
    chunks, gradients = [], []
    for start in range(0, len(bank), size):
        chunk = slice(start, start + size)
        part = {name: weight.detach()[chunk].requires_grad_() for name, weight in weights.items()}
        rows = losses(partial(functional_call, bank, part), chunk)
        gradients.append(torch.autograd.grad(rows.sum(), list(part.values())))
        chunks.append(rows.detach())
    all_rows = torch.cat(chunks)
    pairs = zip(weights.values(), (torch.cat(g) for g in zip(*gradients, strict=True)), strict=True)
    linear = torch.stack([(weight * gradient).sum() for weight, gradient in pairs]).sum()
    return all_rows, all_rows.sum() + linear - linear.detach()
