"""Progress of a long measurement and the time it still takes: a bar in a terminal, elsewhere a line now and then."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY = 60.0  # seconds between two lines, where the output is no terminal


class Pace:
    """Counts measurements, and estimates the time that is left from those that were made in this run.

    Figures that an earlier run left take no time, so they do not count for the speed.

    Args:
        console: prints the bar or the lines.
        name: of the measurement, for the lines.
        works: amount of work of each measurement, in any unit that time is proportional to.
        clock: returns seconds.
    """

    def __init__(
        self, console: Console, name: str, works: list[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.name, self.clock = console, name, clock
        self.count, self.done, self.left = len(works), 0, sum(works)
        self.measured_work = self.measured_seconds = 0.0
        self.measured_count = 0
        self.last_line = clock()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=console)
        self.task = self.progress.add_task(name, total=self.count, left="")

    def __enter__(self) -> "Pace":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()
        elif kind is None:
            self._line("")

    def describe(self, what: str) -> None:
        """Say what is measured now."""
        self.progress.update(self.task, description=what)

    def advance(self, work: float, seconds: float | None) -> None:
        """Count one measurement.

        Args:
            work: its amount of work.
            seconds: that it took; None: its figures were there already.
        """
        self.done, self.left = self.done + 1, self.left - work
        if seconds is not None:
            self.measured_work, self.measured_seconds = self.measured_work + work, self.measured_seconds + seconds
            self.measured_count += 1
        self.progress.update(self.task, completed=self.done, left=self.time_left)
        if not self.console.is_terminal and self.clock() - self.last_line >= EVERY and self.done < self.count:
            self._line(self.progress.tasks[self.task].description)

    @property
    def time_left(self) -> str:
        """The estimate in words, such as `about 1 h 05 min left`; empty before the first measurement."""
        if not self.measured_work or self.done == self.count:
            return ""
        minutes = round(self.left * self.measured_seconds / self.measured_work / 60)
        hours, minutes = divmod(minutes, 60)
        return f"about {hours} h {minutes:02d} min left" if hours else f"about {max(1, minutes)} min left"

    def _line(self, what: str) -> None:
        self.last_line = self.clock()
        speed = ""
        if self.measured_count:
            speed = f"{self.measured_seconds / self.measured_count:.1f} s each"
        parts = (what, speed, self.time_left)
        told = "".join(f"; {part}" for part in parts if part)
        self.console.print(f"{self.name}: {self.done} of {self.count} measured{told}", highlight=False)
