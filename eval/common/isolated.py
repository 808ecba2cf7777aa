"""Runs a measurement in a fresh process, so that its peak memory is its own."""

import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smartkv.errors import SmartKVError, error_line


def run_isolated(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run `measure(*arguments)` in a new process.

    Args:
        measure: a function at the top of a module, which the new process imports.
        arguments: of `measure`.

    Returns:
        Its figures and `peak_memory`, bytes; or `{"note": …}` alone where memory was not enough.

    Raises:
        SmartKVError: the measurement failed for another reason, which the message gives or stderr shows.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, arguments))
    with _interrupts_ignored():  # the new process inherits it: a Ctrl-C ends this one, and that ends the other
        process.start()
    sender.close()
    try:
        figures: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:  # the kernel sends SIGKILL when memory is short
            name = f"{measure.__module__}.{measure.__qualname__}"
            raise SmartKVError(f"{name} ended without a result (status {process.exitcode}): see above") from None
        return {"note": "killed: out of memory"}
    except BaseException:  # an interrupt
        process.terminate()
        raise
    finally:
        process.join()
    if "error" in figures:
        raise SmartKVError(figures["error"])
    return figures


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _send(sender: Any, measure: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    """Measure, and send the figures to the parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        figures = measure(*arguments)
    except Exception as error:
        if (message := error_line(error)) is not None:
            figures = {"error": message}
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            figures = {"note": f"out of memory: {str(error).partition(chr(10))[0]}"}
        else:
            raise
    sender.send(figures if {"note", "error"} & figures.keys() else {"peak_memory": _peak()} | figures)


def _end_with_parent() -> None:
    """End this process when its parent ends, so that a killed command leaves no measurement running."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _peak() -> int:
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024  # ru_maxrss would start with the parent's memory
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
