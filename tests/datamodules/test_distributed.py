"""Communication of processes: sums and errors of a real group of two, and the check of a resumed run's data."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from datamodules import distributed as module
from datamodules.distributed import check_resumed, failing_together, process_of, sum_over_processes
from smartkv.errors import SmartKVError


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> list[Any]:
    """Run `work` in a group of two processes; what each saved under its rank."""

    def process(rank: int) -> None:
        torch.set_num_threads(1)
        store = distributed.FileStore(str(folder / "store"), 2)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        work(rank, folder / f"{rank}.pt")
        distributed.destroy_process_group()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for started in processes:
        started.start()
    for started in processes:
        started.join(90)
        assert started.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def trainer_of_two() -> Any:
    """What a sum needs of a trainer in a group of two."""

    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        distributed.all_reduce(tensor)
        return tensor

    return SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce))


def test_without_a_trainer_a_process_is_alone() -> None:
    assert process_of(None) == (0, 1)
    assert process_of(SimpleNamespace(global_rank=3, world_size=5)) == (3, 5)


def test_a_sum_in_chunks_is_the_sum_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)

    def work(rank: int, path: Path) -> None:
        totals = [torch.arange(6.0).view(2, 3) + rank, torch.tensor(10.0 * rank)]
        sum_over_processes(trainer_of_two(), totals)
        torch.save(totals, path)

    for totals in in_two_processes(work, tmp_path):
        assert totals[0].tolist() == [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]] and float(totals[1]) == 10.0


def test_an_error_of_one_process_is_raised_in_all(tmp_path: Path) -> None:
    def work(rank: int, path: Path) -> None:
        try:
            with failing_together():
                if rank == 1:
                    raise SmartKVError("shard 7 is damaged")
        except SmartKVError as error:
            torch.save(str(error), path)

    assert in_two_processes(work, tmp_path) == ["shard 7 is damaged"] * 2


def test_each_process_raises_its_own_error_and_none_where_there_is_none(tmp_path: Path) -> None:
    def work(rank: int, path: Path) -> None:
        with failing_together():
            pass
        try:
            with failing_together():
                raise SmartKVError(f"of {rank}")
        except SmartKVError as error:
            torch.save(str(error), path)

    assert in_two_processes(work, tmp_path) == ["of 0", "of 1"]


def test_alone_an_error_passes_through() -> None:
    with pytest.raises(SmartKVError, match="damaged"), failing_together():
        raise SmartKVError("damaged")


def test_a_checkpoint_of_other_data_is_refused_with_both() -> None:
    check_resumed({"seed": 0}, {"seed": 0})
    with pytest.raises(SmartKVError, match=r"other data \(seed 0, now 1\): the same rows cannot follow"):
        check_resumed({"seed": 0}, {"seed": 1})
