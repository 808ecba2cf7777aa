"""The GPU check: its parts, and its command.

The parts come in the order of what is wanted most, and each cell is written as soon as it is measured: a run that is
cut off leaves what it has. A part that fails is noted, and the others go on. Weights are random, because time and
memory do not depend on them. Nothing but torch, transformers, lightning and peft is imported: a lent machine has no
more.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eval.gpu import whole_model
from eval.gpu.one_layer import one_layer
from eval.gpu.shapes import SHAPES, TINY, Shape, build
from eval.gpu.tables import page
from eval.gpu.timing import first_line
from eval.gpu.whole_model import SHARE
from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically

CONTEXTS, BATCHES = (8_192, 32_768), (1, 8, 32)
MINUTES = 9.0
LARGE = 4_096  # width of a model whose long answers take too long
TESTS_SECONDS = 150  # that the tests may take
Row = dict[str, Any]


class Check:
    """The parts of a check, whose rows are written as they come.

    Args:
        device: cpu or cuda.
        tiny: tiny models and lengths, to try the check itself.
        out: folder for gpu.json and gpu.md.
        minutes: after which no further cell is begun.
    """

    def __init__(self, device: str, tiny: bool, out: Path, minutes: float) -> None:
        self.device, self.tiny, self.out = torch.device(device), tiny, out
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.end = time.monotonic() + 60 * minutes
        dtype = str(self.dtype).removeprefix("torch.")
        self.arguments = {"device": device, "tiny": tiny, "share of keys": SHARE, "dtype": dtype}
        self.parts: dict[str, list[Row]] = {}
        self.shapes = TINY if tiny else SHAPES
        self.contexts: tuple[int, ...] = (128,) if tiny else CONTEXTS
        self.batches: tuple[int, ...] = (1, 2) if tiny else BATCHES

    def run(self) -> None:
        """Measure all parts."""
        parts: dict[str, Callable[[], Iterable[Row]]] = {
            "one_layer": self.one_layer,
            "tests": self.tests,
            "fit": self.fit,
        }
        for name, part in parts.items():
            self._take(name, {}, part)
            if name == "one_layer":
                self._of_models()
        self._write()

    # -- parts --------------------------------------------------------------------------------------------------------

    def one_layer(self) -> Iterator[Row]:
        """Yield rows of attention of one layer, for each shape, context and batch."""
        for name, shape in self.shapes.items():
            for context in self.contexts:
                for batch in self.batches:
                    if self._time_left():
                        for row in one_layer(shape, batch, context, SHARE, self.device, self.dtype):
                            yield {"shape": name, "context": context, "batch": batch, **row}

    def _of_models(self) -> None:
        """Measure what needs a whole model, the small ones first."""
        for name, shape in self.shapes.items():
            if self._time_left():
                try:
                    model = build(shape, self.device, self.dtype, 2 * max(self.contexts) + whole_model.ROOM)
                except (RuntimeError, SmartKVError) as reason:
                    self._add("steps", {"shape": name, "note": f"not built: {first_line(reason)}"})
                    continue
                self._of_model(name, shape, model)
                del model
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _of_model(self, name: str, shape: Shape, model: PreTrainedModel) -> None:
        """Measure steps, a prompt, labels and memory of one model."""
        for context in self.contexts:
            for batch in self.batches:
                where = {"shape": name, "context": context, "batch": batch}
                if not whole_model.enough_memory(model, batch, context):
                    self._add("steps", where | {"note": "a full cache and its copy do not fit"})
                    continue
                self._take("steps", where, partial(whole_model.decode_steps, model, batch, context, SHARE))
        context = self.contexts[0]
        where = {"shape": name, "context": context, "batch": 1}
        self._take("prefill", where, lambda: whole_model.prefill(model, 1, context))
        self._take("harvest", where | {"context": context // 2}, lambda: whole_model.harvest(model, context // 2))
        if shape.hidden < LARGE:
            steps, rows = (70, 2) if self.tiny else (2_000, 8)
            where = {"shape": name, "context": context, "batch": rows}
            self._take("memory", where, lambda: [whole_model.memory_of_an_answer(model, rows, context, steps)])

    def tests(self) -> Iterator[Row]:
        """Yield the outcome of the tests that need a GPU."""
        if self.device.type != "cuda":
            yield {"way": "pytest -m gpu", "note": "not run: the check is on the CPU"}
            return
        if find_spec("pytest") is None:
            yield {"way": "pytest -m gpu", "note": "not run: this machine has no pytest"}
            return
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_SECONDS)
        except subprocess.TimeoutExpired:
            yield {"way": "pytest -m gpu", "note": f"not done in {TESTS_SECONDS} seconds"}
            return
        last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", last)}
        failed = counts.get("failed", 0) + counts.get("error", 0)
        yield {"way": "pytest -m gpu", "passed": counts.get("passed", 0), "failed": failed, "note": last}
        (self.out / "gpu_tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")

    def fit(self) -> Iterator[Row]:
        """Yield the seconds of training 48 gates together and one after another."""
        from eval.speed.gate_fits import both_ways  # lightning takes seconds to import

        batch, steps, window = (32, 2, 64) if self.tiny else (4_096, 100, 1_024)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.enable_grad():
            found = both_ways(Path(folder), batch, steps, 1, window, 16, os.cpu_count() or 1, self.device.type)
        yield {"way": f"{steps} steps", "batch": batch} | {key: found[key] for key in ("together", "apart", "ratio")}

    # -- the run ------------------------------------------------------------------------------------------------------

    def _time_left(self) -> bool:
        return time.monotonic() < self.end

    def _take(self, part: str, where: Row, measure: Callable[[], Iterable[Row]]) -> None:
        """Add the rows of a measurement, or a note why there are none."""
        if not self._time_left():
            self._add(part, where | {"note": "no time was left"})
            return
        try:
            for row in measure():
                self._add(part, where | row)
        except (RuntimeError, ImportError, OSError, SmartKVError) as reason:  # a kernel, memory, a library that lacks
            self._add(part, where | {"note": f"failed: {first_line(reason)}"})

    def _add(self, part: str, row: Row) -> None:
        self.parts.setdefault(part, []).append(row)
        told = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in told.items()), flush=True)
        self._write()

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        machine = machine_of(self.device)
        result = {"arguments": self.arguments, "machine": machine, **self.parts}
        write_atomically(self.out / "gpu.json", json.dumps(result, indent=1).encode())
        text = page(machine, self.arguments, self.parts)
        write_atomically(self.out / "gpu.md", text.encode())


def machine_of(device: torch.device) -> dict[str, Any]:
    """Describe the machine in words."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": str(torch.__version__), "transformers": version("transformers")}


def main(args: list[str] | None = None) -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.gpu", description="Measure SmartKV on a GPU in a few minutes, with random weights."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and lengths, to try the check itself")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json, gpu.md (%(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin nothing after so many (%(default)s)")
    given = parser.parse_args(args)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: device 'cuda' cannot be used here: torch finds no GPU", file=sys.stderr)
        return 2
    with torch.inference_mode():
        check = Check(given.device, given.tiny, given.out, given.minutes)
        check.run()
    print(f"  {given.out / 'gpu.json'}\n  {given.out / 'gpu.md'}")
    return 0
