"""A measurement in a fresh process, so that peak memory is its own."""

import multiprocessing
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any


def apart(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `measure(*arguments)` returns in a new process, with `peak_memory` in bytes; {"note": …} where it died.

    Args:
        measure: a function of a module, which the new process imports.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return {"note": "the process ended without a result (out of memory?)"}
    finally:
        process.join()


def _send(sender: Any, measure: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    figures = measure(*arguments)
    sender.send(figures if "note" in figures else {"peak_memory": _peak()} | figures)


def _peak() -> int:
    """Bytes of memory that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024  # ru_maxrss would start with what the parent held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
