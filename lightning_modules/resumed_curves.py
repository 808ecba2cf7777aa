"""Curves of a resumed run, in which each step stands once.

A run logs on after its checkpoint until it is killed, and the resumed run logs the same steps again. So does a run that
is resumed from an older checkpoint, or that begins anew because it was killed before its first.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from smartkv.io.atomic import write_atomically

Point = tuple[str, int]  # tag and step of a logged figure
Row = dict[str, str]  # figure and step of a CSV file, by name
BESIDE = ("step", "epoch")  # columns that every row of a CSV file has, beside its figures


class Curves(Protocol):
    """What earlier processes have written for a logger. Made before the logger starts, which may delete it."""

    def begin(self, steps: int) -> None:
        """Delete the points of the steps from `steps` on."""

    def purge(self) -> None:
        """Delete the points that this process has logged again."""

    def restore(self) -> None:
        """Write back what the logger has deleted at its start."""


class ResumedCurves(L.Callback):
    """Callback that deletes what a run has logged after the checkpoint from which it is resumed; all, without one.

    Lightning counts the steps of a log from 0: a checkpoint after `n` steps has the points of the steps below `n`. The
    resumed run may repeat the validation or the end of the epoch at the last of them. Which figures these are is known
    before the next batch; their earlier points are deleted then. Figures of a run's end follow at its end.

    Args:
        loggers: loggers that have not started yet.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.curves = [curves for logger in loggers if (curves := _curves(logger)) is not None]
        self.resumed = self.purged = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Delete the steps that will be logged again."""
        self.resumed = True
        for curves in self.curves:
            curves.begin(checkpoint["global_step"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete all curves of the run that this one replaces."""
        if not self.resumed:
            self.purged = True
            for curves in self.curves:
                curves.begin(0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Delete, before the first new batch, what was logged again at the checkpoint's last step."""
        if not self.purged:
            self._purge()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete the earlier figures of a run's end."""
        self._purge()

    def _purge(self) -> None:
        self.purged = True
        for curves in self.curves if self.resumed else ():
            curves.purge()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write back the curves of the run in whose folder this one was refused."""
        if not (self.resumed or self.purged):
            for curves in self.curves:
                curves.restore()


def _curves(logger: Logger) -> Curves | None:
    if isinstance(logger, TensorBoardLogger):
        return _TensorBoard(logger)
    return _Csv(logger) if isinstance(logger, CSVLogger) else None


class _TensorBoard:
    """Curves in TensorBoard's event files.

    The files are written anew without the points. TensorBoard's own `purge_step` hides whole steps from its reader, and
    so those figures of the last step that are not logged again.
    """

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger
        self.folder, self.earlier = Path(logger.log_dir), _event_files(Path(logger.log_dir))

    def begin(self, steps: int) -> None:
        for path in self.earlier:
            _rewrite(path, lambda tag, step: step >= steps)

    def purge(self) -> None:
        self.logger.experiment.flush()
        logged: set[Point] = set()
        for path in _event_files(self.folder) - self.earlier:
            for _, event in _events(path):
                logged |= {(value.tag, event.step) for value in event.summary.value}
        for path in self.earlier:
            _rewrite(path, lambda tag, step: (tag, step) in logged)

    def restore(self) -> None:
        """Do nothing: TensorBoard's writer deletes no file."""


def _event_files(folder: Path) -> set[Path]:
    return set(folder.glob("events.out.tfevents.*"))


def _events(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Yield the records of an event file, each with its event."""
    # imported here, because a machine without curves may have no TensorBoard (`python -m eval.gpu`)
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for record in RawEventFileLoader(str(path)).Load():
        yield record, Event.FromString(record)


def _rewrite(path: Path, drop: Callable[[str, int], bool]) -> None:
    """Write an event file without the points for which `drop(tag, step)` is true; leave it alone if there are none."""
    if not path.is_file():  # deleted since: a run that begins anew may delete what it replaces
        return
    from tensorboard.summary.writer.record_writer import RecordWriter

    content, changed = io.BytesIO(), False
    records = RecordWriter(content)
    for record, event in _events(path):
        kept = [value for value in event.summary.value if not drop(value.tag, event.step)]
        if len(kept) == len(event.summary.value):
            records.write(record)
            continue
        changed = True
        if kept:
            del event.summary.value[:]
            event.summary.value.extend(kept)
            records.write(event.SerializeToString())
    if changed:
        write_atomically(path, content.getvalue())


class _Csv:
    """Curves in the CSV file of a logger, which deletes an earlier file when it starts."""

    def __init__(self, logger: CSVLogger) -> None:
        self.logger, self.path = logger, Path(logger.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        self.earlier = _rows(self.path)

    def begin(self, steps: int) -> None:
        self.earlier = [row for row in self.earlier if int(row["step"]) < steps]
        if self.earlier:
            self._write(self.earlier, [])

    def purge(self) -> None:
        self.logger.save()
        later = _rows(self.path)[len(self.earlier) :]
        logged = {(name, row["step"]) for row in later for name in row if name not in BESIDE}
        kept = [{name: v for name, v in row.items() if (name, row["step"]) not in logged} for row in self.earlier]
        if kept != self.earlier:
            self._write([row for row in kept if set(row) - set(BESIDE)], later)

    def restore(self) -> None:
        if not self.path.is_file():
            self._write(self.earlier, [])

    def _write(self, earlier: list[Row], later: list[Row]) -> None:
        writer: Any = self.logger.experiment
        self.earlier = earlier
        self.path.unlink(missing_ok=True)
        writer.metrics = earlier + later
        writer.save()


def _rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file without empty cells; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
