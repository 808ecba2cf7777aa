"""Measurements in processes of their own: what comes back, and what is said where nothing does."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from eval.common.isolated import run_isolated
from smartkv.errors import SmartKVError


def _allocated(megabytes: int) -> dict[str, Any]:
    return {"sum": float(np.ones(megabytes * 2**17).sum())}


def _ends(how: str) -> dict[str, Any]:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/all.pt")
    if how == "mistake":
        raise SmartKVError("this was a mistake")
    if how == "memory":
        raise MemoryError("so much")
    raise ZeroDivisionError


def test_peak_memory_is_that_of_the_measurement_alone() -> None:
    held = np.ones(400 * 2**17)  # 400 MiB that are not the measurement's
    small, large = run_isolated(_allocated, 1), run_isolated(_allocated, 200)
    assert large["sum"] == 200 * 2**17 and held.sum() > 0
    assert 150 * 2**20 < large["peak_memory"] - small["peak_memory"] < 300 * 2**20


def _slow(told: Path) -> dict[str, Any]:
    told.write_text(str(os.getpid()))
    time.sleep(120)
    return {}


def test_a_measurement_ends_with_the_command_that_asked_for_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    command = multiprocessing.get_context("spawn").Process(target=run_isolated, args=(_slow, told))
    command.start()
    try:
        wait_for(lambda: told.exists() and told.read_text(), seconds=240)  # two processes import torch
    finally:
        command.kill()
    wait_for(lambda: not psutil.pid_exists(int(told.read_text())))


def wait_for(happened: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("how", "note"), [("killed", "killed: out of memory"), ("memory", "out of memory: so much")])
def test_a_measurement_without_memory_is_a_note(how: str, note: str) -> None:
    assert run_isolated(_ends, how) == {"note": note}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("full", "/somewhere/all.pt could not be written: No space left"),
        ("mistake", "^this was a mistake$"),
        ("bug", r"test_isolated._ends ended without a result \(status 1\): see above"),
    ],
)
def test_a_measurement_that_fails_is_an_error(how: str, says: str) -> None:
    with pytest.raises(SmartKVError, match=says):
        run_isolated(_ends, how)


def test_an_interrupt_ends_the_measurement_at_once_and_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "pid"

    def interrupt() -> None:
        wait_for(lambda: told.exists() and told.read_text(), seconds=240)
        os.kill(int(told.read_text()), signal.SIGINT)  # a terminal sends it to both
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(_slow, told)
    thread.join()
    assert not psutil.pid_exists(int(told.read_text()))
    assert capfd.readouterr().err == ""
