"""What the steps will take on this machine: time, bytes of disk, and what comes out."""

import shutil
from dataclasses import dataclass

from rich.table import Table

from cli.recipe.configs import VALIDATIONS, Layout, asked_in, steps_of
from cli.recipe.look import Look
from cli.recipe.settings import SIZES, Options
from cli.recipe.timing import AGES, HIDDEN, ROWS, SINKS, THRESHOLDS, WIDE
from smartkv.errors import SmartKVError

START = 15.0  # seconds until a step has loaded its libraries and the model
FILES = 4 * 2**20  # bytes of curves, configs, pictures and tables of a step
READINGS = 7  # of a window in the report: gates and window at three footprints each, and the full cache
VALIDATION_PASSES = 4  # of a window in the distillation: the full cache, and three prices


@dataclass(frozen=True)
class Estimate:
    """What one step will take.

    Attributes:
        step: name of the step.
        work: what it does, in words.
        seconds: of this machine.
        disk: bytes that it leaves.
        leaves: what comes out.
    """

    step: str
    work: str
    seconds: float
    disk: float
    leaves: str


def estimate(layout: Layout, options: Options, look: Look) -> list[Estimate]:
    """Estimate the steps from the pieces that the look has timed."""
    amounts, seconds = SIZES[options.size].within(look.max_positions), look.seconds
    train, validation = amounts.harvest
    heads, gates = look.layers * look.kv_heads, look.gated_layers * look.kv_heads
    labelled = train * (amounts.window - amounts.follow_up - SINKS)
    a_token = heads * (2 * look.head_dim + 4 * len(THRESHOLDS)) + 20
    harvested = (train + validation) * amounts.window
    steps = amounts.epochs * max(1, labelled // ROWS)
    distil_steps, distil_validation = amounts.distilled
    checks = min(VALIDATIONS, distil_steps) * distil_validation * VALIDATION_PASSES
    facts = amounts.facts * len(asked_in(look)) if look.kinds else 0
    readings = (amounts.report * len(look.kinds) + facts) * READINGS
    found = {
        "harvest": Estimate(
            "harvest",
            f"labels {heads} heads of {harvested:,} tokens",
            START + seconds["harvest"] * (train + validation),
            harvested * a_token,
            f"{layout.out}/shards",
        ),
        "lifespans": Estimate(
            "lifespans",
            f"{gates} gates, at most {steps:,} steps of {ROWS} keys a head",
            START + seconds["gates"] * steps * 1.3 + 4 * seconds["forward"],  # with validation; prices on four windows
            FILES + _checkpoints(gates, look.head_dim, HIDDEN, 1),
            f"{layout.out}/lifespans/export",
        ),
        "distilled": Estimate(
            "distilled",
            f"{distil_steps:,} steps of {amounts.short_window:,} tokens through the model",
            START + seconds["distilled"] * distil_steps + seconds["forward"] * (checks + 2 * amounts.calibration),
            FILES + _checkpoints(gates, look.head_dim, WIDE, len(AGES)),
            f"{layout.gates}, with prices and layer shares",
        ),
        "report": Estimate(
            "report",
            f"{len(look.kinds)} kinds of text × {amounts.report} windows, {facts} facts, read {READINGS} times",
            START + seconds["report"] * readings + seconds["forward"] * 2 * amounts.calibration,
            FILES,
            f"{layout.out}/report and the card in {layout.gates}",
        ),
    }
    return [found[step] for step in steps_of(look)]


def _checkpoints(gates: int, head_dim: int, hidden: int, outputs: int) -> float:
    """Return the bytes of the two checkpoints of a fit, with two moments a weight, and of its export."""
    weights = gates * (head_dim * hidden + hidden + hidden * outputs + outputs)
    return 4.0 * weights * (2 * 3 + 1)


def check_disk(layout: Layout, estimates: list[Estimate]) -> None:
    """Check that the disk has room for the steps.

    Raises:
        SmartKVError: it has not.
    """
    needed = sum(each.disk for each in estimates)
    free = shutil.disk_usage(layout.out).free
    if needed > free:
        raise SmartKVError(
            f"the steps leave {in_bytes(needed)} in {layout.out}, which has {in_bytes(free)} free: make room, or give "
            "another folder or a smaller --size"
        )


def estimate_table(options: Options, estimates: list[Estimate], done: set[str]) -> Table:
    """Return the table that is printed before the work.

    Args:
        options: what the user chose.
        estimates: of each step.
        done: steps that are done.
    """
    table = Table(title=f"Gates for {options.backbone}, size {options.size}")
    for name in ("step", "what it does", "time here", "disk", "what comes out"):
        table.add_column(name, justify="right" if name in ("time here", "disk") else "left", overflow="fold")
    for each in estimates:
        time = "done" if each.step in done else in_time(each.seconds)
        table.add_row(each.step, each.work, time, in_bytes(each.disk), each.leaves)
    rest = [each for each in estimates if each.step not in done]
    table.add_section()
    disk = in_bytes(sum(each.disk for each in estimates))
    table.add_row("all", "", in_time(sum(each.seconds for each in rest)), disk, "")
    return table


def in_time(seconds: float) -> str:
    """Return a time in words, rounded to what an estimate is good for."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def in_bytes(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"
