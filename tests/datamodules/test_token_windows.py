"""Windows for distillation and eviction tuning: which come, in which order and to which process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.token_windows import TokenWindows
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts
from tests.lightning_fixtures import WINDOW


@pytest.fixture
def windows(tiny_backbone: Path, tiny_texts: Path) -> Any:
    """Windows that are ready, as one of several processes sees them."""

    def ready(rank: int = 0, world_size: int = 1, **changes: Any) -> TokenWindows:
        arguments = {"windows": WindowCounts(7, 3), "window": WINDOW, "windows_per_document": 9, "batch_size": 2}
        sources = [SourceConfig(name="mine", path=str(tiny_texts))]
        data = TokenWindows(sources, backbone=str(tiny_backbone), **arguments | changes)
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=world_size, is_global_zero=rank == 0, current_epoch=0
        )
        data.setup("fit")
        return data

    return ready


def test_an_epoch_has_every_window_once_as_it_was_planned(windows: Any) -> None:
    data = windows()
    batches = list(data.train_dataloader())
    assert [len(batch.number) for batch in batches] == [2, 2, 2, 1]
    number = torch.cat([batch.number for batch in batches])
    assert sorted(number.tolist()) == list(range(7))
    tokens = torch.cat([batch.tokens for batch in batches])
    assert tokens.dtype == torch.int64 and torch.equal(tokens, data.plan.of_split("train")[number].long())


def test_epochs_and_seeds_have_orders_of_their_own(windows: Any) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = windows(seed=seed, windows_per_document=3).train_dataloader()
        loader.set_epoch(epoch)
        return [number for batch in loader for number in batch.number.tolist()]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert order(0, 1) == orders[0, 1]
    assert len({tuple(each) for each in orders.values()}) == 4


def test_processes_divide_each_batch(windows: Any) -> None:
    whole = list(windows().train_dataloader())
    parts = [list(windows(rank, 2).train_dataloader()) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted([*first.number.tolist(), *second.number.tolist()]) == sorted(batch.number.tolist())
        assert first.global_windows == second.global_windows == len(batch.number)


def test_validation_comes_in_order_one_window_a_process(windows: Any) -> None:
    assert [batch.number.tolist() for batch in windows().val_dataloader()] == [[0], [1], [2]]
    assert [batch.number.tolist() for batch in windows(1, 2).val_dataloader()] == [[1], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1, "world_size": 2}, "at least 1 window a process, of which there are 2, got 1"),
        ({"windows": WindowCounts(4, 0)}, "windows of train and validation must be at least 1 each"),
        ({"window": 513}, "window 513 is longer than the 512 positions"),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(changes: dict[str, Any], message: str, windows: Any) -> None:
    with pytest.raises(SmartKVError, match=message):
        windows(**changes)


def test_a_checkpoint_of_other_windows_is_refused(windows: Any) -> None:
    state = windows().state_dict()
    windows().load_state_dict(state)
    with pytest.raises(SmartKVError, match="the same rows cannot follow"):
        windows(seed=1).load_state_dict(state)
