"""A small fit with callbacks, and what it leaves."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.lightning_fixtures import Watcher, fit

HEADS = ["L00H0", "L00H1", "L01H0", "L01H1"]
EPOCHS = 2


@dataclass
class Run:
    """A finished fit: its folder, the one that looked on, what it printed, and what TensorBoard reads of it."""

    root: Path
    watcher: Watcher
    printed: str
    events: EventAccumulator

    def scalars(self, tag: str) -> list[float]:
        return [event.value for event in self.events.Scalars(tag)]

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the exported gates."""
        return json.loads((self.root / "export" / "config.json").read_text())


def callbacks(root: Path, per_head: bool = False) -> list[dict[str, Any]]:
    """As the configs in configs/gates have them."""
    keep = {"dirpath": str(root / "checkpoints"), "monitor": "val_r2_mean", "mode": "max", "save_last": True,
            "enable_version_counter": False}  # fmt: skip
    return [
        {"class_path": "ModelCheckpoint", "init_args": keep},
        {"class_path": "GateExport", "init_args": {"out": str(root / "export"), "per_head": per_head}},
    ]


def tensorboard(root: Path) -> dict[str, Any]:
    options = {"save_dir": str(root), "name": "board", "version": "", "default_hp_metric": False}
    return {"class_path": "TensorBoardLogger", "init_args": options}


def run(shards: Path, root: Path, chosen: list[dict[str, Any]]) -> Run:
    trainer = {"logger": tensorboard(root), "max_epochs": EPOCHS}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        watcher = fit(shards, root, callbacks=chosen, trainer=trainer)
    events = EventAccumulator(str(root / "board"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return Run(root, watcher, printed.getvalue(), events.Reload())
