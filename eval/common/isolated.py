"""A measurement in a fresh process, so that peak memory is its own."""

import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smartkv.errors import SmartKVError, error_line


def run_isolated(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `measure(*arguments)` returns in a new process, with `peak_memory` in bytes; {"note": …} where it had not
    enough memory.

    Args:
        measure: a function of a module, which the new process imports.

    Raises:
        SmartKVError: the measurement failed otherwise; what it met is on stderr, or said here.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:  # which is what a machine without memory does to it
            name = f"{measure.__module__}.{measure.__qualname__}"
            raise SmartKVError(f"{name} ended without a result (status {process.exitcode}): see above") from None
        return {"note": "killed: out of memory"}
    finally:
        process.join()
    if "error" in found:
        raise SmartKVError(found["error"])
    return found


def _send(sender: Any, measure: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        figures = measure(*arguments)
    except Exception as error:
        if (said := error_line(error)) is not None:
            figures = {"error": said}
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            figures = {"note": f"out of memory: {str(error).partition(chr(10))[0]}"}
        else:
            raise
    sender.send(figures if {"note", "error"} & figures.keys() else {"peak_memory": _peak()} | figures)


def _end_with_parent() -> None:
    """A command that is killed leaves no measurement behind that goes on for minutes."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _peak() -> int:
    """Bytes of memory that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024  # ru_maxrss would start with what the parent held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
