"""What the folder of a run remembers: the options, the look, and which steps are done."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.recipe.configs import Layout, steps_of
from cli.recipe.look import Look
from cli.recipe.settings import Options
from smartkv.errors import SmartKVError
from smartkv.gates.pretrained import CONFIG
from smartkv.io.atomic import write_atomically
from smartkv.io.checks import differences

RECORD = "recipe.json"
BEGIN_ANEW = "give it a folder of its own, or begin anew with --overwrite"
NOT_OURS = "nothing was deleted; give it a folder of its own, or look what is there and delete it yourself"


@dataclass
class Record:
    """The state of a run, in `recipe.json`.

    Attributes:
        layout: the folder.
        options: of the run.
        look: None: not looked yet.
        seconds: time that each finished step took when it was last run.
    """

    layout: Layout
    options: Options
    look: Look | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self) -> None:
        """Write the state, atomically."""
        content = {
            "options": self.options.to_dict(),
            "look": None if self.look is None else self.look.to_dict(),
            "seconds": self.seconds,
        }
        write_atomically(self.layout.out / RECORD, json.dumps(content, indent=1).encode())

    def finish(self, step: str, seconds: float) -> None:
        """Remember that a step is done."""
        self.seconds[step] = round(seconds, 1)
        self.write()

    @property
    def done(self) -> set[str]:
        """The steps that need not run: those that are done and whose result is there, and all before such a step."""
        if self.look is None:
            return set()
        steps = steps_of(self.look)
        finished = [n for n, s in enumerate(steps) if s in self.seconds and self._is_there(s)]
        return set(steps[: max(finished, default=-1) + 1])

    def _is_there(self, step: str) -> bool:
        gates = step != "report" or (self.layout.gates / CONFIG).is_file()  # whose card has the report
        return gates and self.layout.result(step).is_file()


def open_record(layout: Layout, options: Options, overwrite: bool) -> Record:
    """Open the state of a run, or begin one. Nothing is written or deleted.

    Args:
        layout: the folder, which need not exist.
        options: of this run.
        overwrite: what an earlier run left does not count.

    Raises:
        SmartKVError: the folder holds the result of other options, or files of something else, or cannot be made.
    """
    path = layout.out / RECORD
    _check_place(layout.out)
    found = layout.out.iterdir() if layout.out.is_dir() else ()
    others = sorted(each.name for each in found if not each.name.startswith("."))
    if others and not path.is_file():
        raise SmartKVError(
            f"{layout.out} holds {others[0]}{' and more' if len(others) > 1 else ''}, which this command did not make: "
            "give an empty folder, or one that is not there yet"
        )
    if not others:
        return Record(layout, options)
    content = _read(path)
    if overwrite:
        return Record(layout, options)
    if changed := differences(content["options"], json.loads(json.dumps(options.to_dict()))):
        raise SmartKVError(f"{layout.out} holds gates of other options ({'; '.join(changed)}): {BEGIN_ANEW}")
    try:
        look = None if content["look"] is None else Look.from_dict(content["look"])
    except (TypeError, KeyError) as error:
        raise SmartKVError(f"{path} was written by another version of SmartKV: {BEGIN_ANEW}") from error
    return Record(layout, options, look, dict(content["seconds"]))


def _check_place(out: Path) -> None:
    """Raise SmartKVError if a folder can be neither made nor written to."""
    place = next(each for each in [out, *out.absolute().parents] if each.exists())
    if not place.is_dir():
        raise SmartKVError(f"{out} cannot be written to: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise SmartKVError(f"{out} cannot be written to: Permission denied")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmartKVError(f"{path} cannot be read ({type(error).__name__}): {NOT_OURS}") from error
    parts = [content.get(name) for name in ("options", "seconds")] if isinstance(content, dict) else []
    known = all(isinstance(part, dict) for part in parts) and parts and "look" in content
    if not known or not {"backbone", "size"} <= content["options"].keys():
        raise SmartKVError(f"{path} does not describe a run of this command: {NOT_OURS}")
    return content
