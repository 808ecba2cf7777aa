"""Measurements in processes of their own: what comes back, and what is said where nothing does."""

import errno
import os
import signal
from typing import Any

import numpy as np
import pytest

from eval.apart import apart
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
    small, large = apart(_allocated, 1), apart(_allocated, 200)
    assert large["sum"] == 200 * 2**17 and held.sum() > 0
    assert 150 * 2**20 < large["peak_memory"] - small["peak_memory"] < 300 * 2**20


@pytest.mark.parametrize(("how", "note"), [("killed", "killed: out of memory"), ("memory", "out of memory: so much")])
def test_a_measurement_without_memory_is_a_note(how: str, note: str) -> None:
    assert apart(_ends, how) == {"note": note}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("full", "/somewhere/all.pt could not be written: No space left"),
        ("mistake", "^this was a mistake$"),
        ("bug", r"test_apart._ends ended without a result \(status 1\): see above"),
    ],
)
def test_a_measurement_that_fails_is_an_error(how: str, says: str) -> None:
    with pytest.raises(SmartKVError, match=says):
        apart(_ends, how)
