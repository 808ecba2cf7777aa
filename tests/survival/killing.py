"""Runs in processes of their own, killed with SIGKILL at random moments until they have had enough."""

import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lightning_fixtures import run_cli

LONGEST = 600  # seconds of a run on tiny models; one that takes longer hangs


@dataclass
class Log:
    """What happened.

    Attributes:
        kills: seconds after its start at which each run was killed.
        rounds: runs that were killed and gone on with until they ended.
    """

    kills: list[float] = field(default_factory=list)
    rounds: int = 0

    def line(self, name: str) -> str:
        """For people."""
        spread = f"{min(self.kills):.2f} to {max(self.kills):.2f} s after their start"
        return f"{name}: {len(self.kills)} kills in {self.rounds} rounds, {spread}"


def _start(run: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def exit_status(run: Callable[[], None]) -> int:
    """Of a run in a process of its own, which must end in time."""
    process = _start(run)
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a run was not done after {LONGEST} s")
    return int(process.exitcode)


def seconds(run: Callable[[], None]) -> float:
    """Of an uninterrupted run, which must end well."""
    begin = time.monotonic()
    assert exit_status(run) == 0
    return time.monotonic() - begin


def killed_until_done(run: Callable[[], None], whole: float, most: int, random_: random.Random, log: Log) -> None:
    """One round: kill the run at a random moment of the first two thirds of its time, `most` times, and let the last
    one end. Fewer kills where a run ended before its time had come: then it was done.

    Args:
        run: starts, or goes on with, the same work.
        whole: seconds of an uninterrupted run.
    """
    log.rounds += 1
    for _ in range(most):
        process = _start(run)
        moment = random_.uniform(0.02, 0.67) * whole
        process.join(moment)
        if process.exitcode is not None:
            assert process.exitcode == 0, "a run that goes on after a kill failed"
            return
        process.kill()
        process.join()
        log.kills.append(moment)
    assert exit_status(run) == 0, "a run that goes on after a kill failed"


def cli(*args: str | Path) -> Callable[[], None]:
    """`python main.py …`, to be run in a forked process (the imports are done already, so kills hit the work)."""
    return lambda: run_cli(*args)
