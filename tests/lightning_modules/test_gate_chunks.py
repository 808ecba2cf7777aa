"""A loss taken in parts is the loss taken whole: value, rows and gradients."""

import pytest
import torch
from torch import Tensor

from lightning_modules.gate_chunks import Predict, in_chunks
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import FutureAttention, Log4Lifespan, Objective, OrdinalAges, Ranking
from smartkv.models.architecture import Fingerprint

OBJECTIVES = [Log4Lifespan(), Log4Lifespan("mse"), OrdinalAges((4, 16)), FutureAttention((16, 64)), Ranking()]


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("size", [1, 4, 5, 6, 99])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_parts_add_up(objective: Objective, size: int, rows: int) -> None:
    torch.manual_seed(rows)
    bank = GateBank(Fingerprint("llama", 3, 2, 8, "made"), hidden=16, outputs=objective.outputs)
    keys, target = torch.randn(6, rows, 8), torch.rand(6, rows, objective.outputs) * 4

    def losses(predict: Predict, gates: slice) -> Tensor:
        return objective.row_loss(predict(keys[gates]), target[gates])

    whole = losses(bank, slice(None))
    expected = torch.autograd.grad(whole.sum() * 3, list(bank.parameters()))
    found, total = in_chunks(bank, losses, size)
    (total * 3).backward()
    torch.testing.assert_close(found, whole.detach())
    torch.testing.assert_close(total.detach(), whole.detach().sum())
    for weight, gradient in zip(bank.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert not found.requires_grad
