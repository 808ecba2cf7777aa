"""A measurement in a fresh process, so that peak memory is its own."""

import multiprocessing
import resource
from collections.abc import Callable
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send(figures if "note" in figures else figures | {"peak_memory": peak})
