"""Means by head: float64 sums over batches, rows that do not divide, and a resumed sum."""

import pytest
import torch

from lightning_modules.head_metrics import HeadMean


def test_the_mean_is_over_all_rows_of_batches_of_any_size() -> None:
    torch.manual_seed(0)
    rows, metric = torch.randn(3, 17), HeadMean(3)
    for batch in rows.split([8, 0, 1, 8], dim=1):
        metric.update(batch)
    expected = [sum(float(value) for value in head) / 17 for head in rows]
    assert metric.compute().dtype == torch.float64
    assert metric.compute().tolist() == pytest.approx(expected, rel=1e-12)


def test_small_rows_beside_large_ones_are_not_lost() -> None:
    metric = HeadMean(1)
    for value in (2.0**25, 1.0, 1.0):  # float32 has no 2**25 + 1
        metric.update(torch.tensor([[value]]))
    assert float(metric.compute()) * 3 == 2.0**25 + 2


def test_a_mean_goes_on_from_the_sums_of_a_checkpoint() -> None:
    whole, first, resumed = HeadMean(2), HeadMean(2), HeadMean(2)
    batches = torch.arange(12.0).view(3, 2, 2)
    for batch in batches:
        whole.update(batch)
    for batch in batches[:2]:
        first.update(batch)
    resumed.go_on_from(first.sums())
    resumed.update(batches[2])
    assert torch.equal(resumed.compute(), whole.compute())
