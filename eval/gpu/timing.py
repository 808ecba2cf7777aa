"""Seconds of functions on a device: each call waited for, the median of several, and replays of captured graphs."""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 3  # calls before the first that is timed
FEW, MANY = 5, 50  # calls that are timed


def wait(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, calls: int = FEW, warm_up: int = WARM_UP) -> float:
    """Return the median seconds of a call, its work on the device included."""
    taken = []
    for number in range(warm_up + calls):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if number >= warm_up:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def replay_seconds(call: Callable[[], object], device: torch.device, calls: int = MANY) -> float:
    """Return the median seconds of a call without its launches: of replays of its CUDA graph; on a CPU of the call.

    Raises:
        RuntimeError: the call waits for the device, or does something else that no graph can capture.
    """
    if device.type != "cuda":
        return seconds(call, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in events)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, cut to the width of a table."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
