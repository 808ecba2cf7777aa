"""Seconds of calls."""

import time

import pytest
import torch

from eval.gpu.timing import FEW, WARM_UP, first_line, replay_seconds, seconds

CPU = torch.device("cpu")


def test_the_median_leaves_out_the_warm_up() -> None:
    calls = list[int]()

    def call() -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) <= WARM_UP else 0.01)

    assert 0.01 <= seconds(call, CPU) < 0.04
    assert len(calls) == WARM_UP + FEW


def test_without_a_gpu_a_call_is_timed_itself() -> None:
    assert 0.001 <= replay_seconds(lambda: time.sleep(0.001), CPU) < 0.05


@pytest.mark.gpu
def test_a_graph_is_replayed() -> None:
    device = torch.device("cuda")
    tensor, calls = torch.zeros(4, device=device), list[int]()

    def call() -> None:
        calls.append(1)
        tensor.add_(1)

    assert replay_seconds(call, device, calls=7) > 0
    assert len(calls) == WARM_UP + 1 and int(tensor[0]) == WARM_UP + 7


@pytest.mark.parametrize(("error", "line"), [(RuntimeError("a\nb"), "a"), (RuntimeError(), "RuntimeError")])
def test_an_error_is_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
