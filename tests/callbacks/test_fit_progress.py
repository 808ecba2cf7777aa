"""The progress bar of a fit."""

from types import SimpleNamespace

import pytest

from callbacks import FitProgress


@pytest.mark.parametrize(
    ("most", "epoch", "text"), [(6, 0, "Epoch 1/6"), (6, 5, "Epoch 6/6"), (-1, 2, "Epoch 3"), (None, 0, "Epoch 1")]
)
def test_epochs_are_counted_from_one(most: int | None, epoch: int, text: str) -> None:
    progress = FitProgress()
    progress._trainer = SimpleNamespace(max_epochs=most)
    assert progress._get_train_description(epoch).strip() == text
