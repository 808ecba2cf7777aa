"""Makes gates for any model with one command, from a look at the model to a card with measured losses.

python -m cli.make_gates --backbone Qwen/Qwen2.5-0.5B --out runs/mine

`make gates MODEL=… OUT=…` is the same. A run that was stopped goes on with the same command.
"""

import signal
import sys
import time
from pathlib import Path
from typing import Literal

from eval.common.interrupts import STATUS, interrupted_line, quiet_interrupts, typed_command

if __name__ == "__main__":  # before the imports that take seconds
    quiet_interrupts(resumes=True)

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from cli.recipe import run as steps
from cli.recipe.card import add_report, check_licence, publish
from cli.recipe.configs import Layout, steps_of, write_configs
from cli.recipe.estimate import check_disk, estimate, estimate_table, in_time
from cli.recipe.look import Look, look
from cli.recipe.record import Record, open_record
from cli.recipe.settings import Device, Options, Size
from eval.common.console import make_console
from eval.common.mistyped import OneLineParser
from smartkv.errors import SmartKVError, one_line_errors
from smartkv.gates.bank import GateBank
from smartkv.gates.model_card import measured_on, no_facts, text_of, usable_footprint
from smartkv.gates.pretrained import CONFIG
from smartkv.io.hub import limit_hub_waiting
from smartkv.io.locks import lock_folder
from smartkv.texts.sources import SourceConfig

Step = Literal["look", "harvest", "lifespans", "distilled", "report"]
REQUIRED = ("--backbone", "--out")
PROGRAM = ["python", "-m", "cli.make_gates"]


def make_gates(
    backbone: str,
    out: str,
    size: Size = "standard",
    sources: list[SourceConfig] | None = None,
    stop_after: Step = "report",
    overwrite: bool = False,
    dtype: str = "auto",
    device: Device = "auto",
    seed: int = 0,
    licence: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Make gates for a model: look, harvest, gates for lifespans, distillation, report. Each step goes on after a kill.

    Args:
        backbone: hub id, local folder, .gguf file, smollm2-135m or qwen2.5-coder-0.5b.
        out: folder for all that is made; the gates are in its subfolder `gates`.
        size: tiny (the whole road in minutes, to try it), small, standard (as much text as the gates that come with
            SmartKV saw) or large.
        sources: texts to learn from, as in configs/harvest; a folder of your own is {name: mine, path: FOLDER}. Null: a
            mix of books, code, chats, an encyclopaedia, web pages, maths and lists, as far as they can be had here.
        stop_after: last step to run: look, harvest, lifespans, distilled or report.
        overwrite: delete what an earlier run left in `out`, and begin anew.
        dtype: of the model: auto (bfloat16 where the hardware multiplies it, else float32), float32, bfloat16 or
            float16.
        device: auto, cpu or cuda.
        seed: of the choice of windows and of the gates' first weights.
        licence: of the model, for the card, such as apache-2.0. Null: what the model's own card says.
        trust_remote_code: run code that comes with the model.
    """
    console = make_console()
    check_licence(licence)
    options = Options(backbone.rstrip("/") or backbone, size, sources, dtype, device, seed, trust_remote_code)
    if seed < 0:
        raise SmartKVError(f"seed must be 0 or more, got {seed}")
    layout = Layout(Path(out))
    record = open_record(layout, options, overwrite)
    seen = record.look
    if seen is None:  # before anything is written: what is refused leaves nothing behind
        console.rule("look")
        seen = look(options, lambda line: console.print(line, highlight=False))
    lock_folder(layout.out)
    record = open_record(layout, options, overwrite)  # as it is now that no other run writes
    if record.look is None:
        _begin(console, record, seen)
    seen = record.look or seen
    write_configs(layout, options, seen)
    _announce(console, record, seen)
    if stop_after == "look":
        return
    for step in steps_of(seen):
        if step not in record.done:
            _run(console, record, step, licence)
        if step == stop_after != "report":
            console.print(f"stopped after {step}: the same command without --stop_after goes on", highlight=False)
            return
    _tell(console, record)


def _begin(console: Console, record: Record, seen: Look) -> None:
    """Begin a run, in place of an earlier one if there was one."""
    if left := record.layout.clear():
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        console.print(f"kept, because this command did not make it: {left[0]}{more}", highlight=False, soft_wrap=True)
    record.look = seen
    record.write()


def _announce(console: Console, record: Record, look: Look) -> None:
    """Print what the steps will take, and the command of each."""
    layout = record.layout
    estimates = estimate(layout, record.options, look)
    check_disk(layout, [each for each in estimates if each.step not in record.done])
    console.print(estimate_table(record.options, estimates, record.done))
    if not look.kinds:
        console.print("No report: there is no text to measure on.", highlight=False)
    console.print("Each step by hand, with its config:", highlight=False)
    for step in steps_of(look):
        console.print(f"  {steps.shown(layout.command(step))}", highlight=False, soft_wrap=True)


def _run(console: Console, record: Record, step: str, licence: str | None) -> None:
    """Run one step; the distilled gates are the result of the run."""
    layout = record.layout
    console.rule(step)
    if step == "report" and not (layout.gates / CONFIG).is_file():
        publish(layout, record.options, licence)
    command = steps.command_of(layout, step)
    console.print(steps.shown(command), highlight=False, soft_wrap=True)
    start = time.monotonic()
    steps.run(command)
    if step == "distilled":
        publish(layout, record.options, licence)
    elif step == "report":
        add_report(layout)
    record.finish(step, time.monotonic() - start)
    console.print(f"{step}: done in {in_time(record.seconds[step])}", highlight=False)


def _tell(console: Console, record: Record) -> None:
    """Print what came out, how to use it and how to publish it."""
    folder = record.layout.gates
    details = GateBank.from_pretrained(folder).details
    console.rule("result")
    if rows := details.get("report", {}).get("texts"):
        table = Table(title=f"ΔNLL on {measured_on(rows)}, nats a token")
        for name in ("text", "asked for", "kept", "gates (95 %)", "window that keeps as much"):
            table.add_column(name, justify="left" if name == "text" else "right")
        for row in rows:
            window, (low, high) = row["window_delta_nll"], row["interval"]
            table.add_row(
                text_of(row),
                f"{row['target']:g}",
                f"{row['footprint']:.3f}",
                f"{row['delta_nll']:+.4f} ({low:+.4f} to {high:+.4f})",
                "" if window is None else f"{window:+.4f}",
            )
        console.print(table)
    for row in details.get("report", {}).get("recall", []):
        console.print(
            f"facts recalled at {row['target']:g} (kept {row['footprint']:.3f}): {row['right']:.0%} of {row['asked']}",
            highlight=False,
        )
    if (none := no_facts(details.get("report", {}))) is not None:
        console.print(f"no recall: {none}", highlight=False)
    lines = [f"gates and their card: {folder}"]
    lines += [f"picture: {path}" for path in sorted((record.layout.out / "report").glob("*.png"))]
    if details.get("prices"):
        footprint = usable_footprint(details["prices"])
        lines.append(f'use them:     LifespanCache(model, gates="{folder}", footprint={footprint})')
    else:
        lines.append("no prices: no footprint can be kept on such short windows; take a larger --size")
    lines.append(f'publish them: GateBank.from_pretrained("{folder}").push_to_hub("user/name")')
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def main(args: list[str] | None = None) -> None:
    """Run the command; a user's mistake ends with one line on stderr and status 2.

    Args:
        args: the command line after `python -m cli.make_gates`; None: that of this process.
    """
    typed = sys.argv[1:] if args is None else list(args)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with one_line_errors():
            limit_hub_waiting()
            words = spelled_out(typed)
            _check_required(words)
            auto_cli(
                make_gates,
                args=words,
                as_positional=False,
                parser_class=OneLineParser,
                prog=" ".join(PROGRAM),
            )
    except KeyboardInterrupt:
        command = typed_command(args, PROGRAM)
        print(f"\n{interrupted_line(without_overwrite(command), resumes=True)}", file=sys.stderr)
        sys.exit(STATUS)
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_required(words: list[str]) -> None:
    """Raise SmartKVError if both required options are missing, of which the parser names one alone."""
    if {word.partition("=")[0] for word in words}.isdisjoint({*REQUIRED, "-h", "--help", "--config"}):
        raise SmartKVError(f"{' and '.join(REQUIRED)} are required, and were not given")


def _terminate(*_: object) -> None:
    """End this process, and with it the step at work."""
    sys.exit(128 + signal.SIGTERM)


def spelled_out(args: list[str]) -> list[str]:
    """Return a command line as the parser knows it: `--stop-after` is `--stop_after`, `--overwrite` needs no value."""
    spelled: list[str] = []
    for number, word in enumerate(args):
        name, mark, value = word.partition("=")
        if name.startswith("--"):
            word = f"--{name[2:].replace('-', '_')}{mark}{value}"
        spelled.append(word)
        following = args[number + 1] if number + 1 < len(args) else "--"
        if word == "--overwrite" and following.lower() not in ("true", "false"):
            spelled.append("true")
    return spelled


def without_overwrite(command: list[str]) -> list[str]:
    """Return a command that goes on with what `--overwrite` has begun anew."""
    kept: list[str] = []
    for number, word in enumerate(command):
        value_of = command[number - 1] if number else ""
        if word.partition("=")[0] != "--overwrite" and (value_of != "--overwrite" or word not in ("true", "false")):
            kept.append(word)
    return kept


if __name__ == "__main__":
    main()
