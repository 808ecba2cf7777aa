"""Runs the command of a step in a process of its own, whose memory is free again when it ends."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from cli.recipe.configs import Layout
from eval.common.interrupts import STATUS, STEP
from smartkv.errors import SmartKVError

ROOT = Path(__file__).parents[2]
GRACE = 2.0  # seconds in which a step ends by the Ctrl-C that a terminal sends it too
PATIENCE = 30.0  # seconds in which an interrupted step writes what it has


def command_of(layout: Layout, step: str) -> list[str]:
    """Return the command of a step after `python`, with the options that go on where an earlier run stopped."""
    command = layout.command(step)
    if step not in ("lifespans", "distilled"):
        return command  # goes on by itself
    folder = layout.out / step
    if any((folder / "checkpoints").glob("last*.ckpt")) or any(folder.glob("hpc_ckpt_*.ckpt")):
        return [*command, "--ckpt_path", "last"]
    # killed before its first checkpoint: what it left is worth nothing
    return [*command, "--overwrite"] if folder.is_dir() else command


def shown(command: list[str]) -> str:
    """Return a command as a user types it."""
    return shlex.join(["python", *command])


def run(command: list[str]) -> None:
    """Run a command of this checkout with this Python. Ctrl-C ends it and then raises KeyboardInterrupt.

    Args:
        command: after `python`.

    Raises:
        SmartKVError: it ended with another status than 0. What was wrong it has printed itself.
    """
    place = [str(ROOT / command[0]), *command[1:]] if command[0].endswith(".py") else command
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), STEP: "1"}
    process = subprocess.Popen([sys.executable, *place], env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        _interrupt(process)
        raise
    except BaseException:
        _end(process, patience=0.0)
        raise
    if status == STATUS:
        raise KeyboardInterrupt
    if status < 0:
        advice = ", often because the memory was full" if status == -9 else ""
        raise SmartKVError(f"'{shown(command)}' was killed by signal {-status}{advice}: the same command goes on")
    if status:
        raise SmartKVError(
            f"'{shown(command)}' stopped with status {status}: do what its error says, and give the same command again"
        )


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Let a process write what it has and end. A second Ctrl-C ends it without."""
    if process.poll() is None:
        print("\nwaiting for the step to write what it has …", file=sys.stderr, flush=True)
    try:
        process.wait(timeout=GRACE)
        return
    except subprocess.TimeoutExpired:  # only this process was interrupted, or there is much to write
        process.send_signal(signal.SIGINT)
        patience = PATIENCE
    except KeyboardInterrupt:
        patience = 0.0
    _end(process, patience)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Wait for a process, and end it if it does not end by itself."""
    try:
        process.wait(timeout=patience)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        try:
            process.wait(timeout=PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
