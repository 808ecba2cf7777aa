"""Entry point of the measurements: `python -m eval <command> --help`."""

import sys
from typing import Any

from eval.common.interrupts import STATUS, end_quietly, interrupted_line, is_step, quiet_interrupts, typed_command

if __name__ == "__main__":  # before the imports that take seconds
    quiet_interrupts(resumes=False)

from jsonargparse import auto_cli

from eval.attention.anchors import anchors
from eval.attention.calibrate import calibrate
from eval.chat.generate import generate
from eval.common.aliases import expand_aliases
from eval.common.mistyped import OneLineParser
from eval.eviction.auto import auto
from eval.eviction.budgets import budgets
from eval.eviction.compare import compare
from eval.eviction.gains import gains
from eval.eviction.kinds import kinds
from eval.eviction.perplexity import perplexity
from eval.eviction.side_by_side import side_by_side
from eval.figures_of_docs import figures
from eval.gates.layers import layers
from eval.gates.objectives import objectives
from eval.gates.score import gates
from eval.quantization.baselines import baselines
from eval.report import report
from eval.speed.decode import decode
from eval.speed.gate_training import training
from eval.speed.harvest import speed
from eval.speed.lookup import lookup
from eval.tasks.code_completion import code_completion
from eval.tasks.longbench import longbench
from eval.tasks.needle import needle
from eval.tasks.reasoning import reasoning
from eval.tasks.ruler import ruler
from smartkv.errors import one_line_errors
from smartkv.io.hub import limit_hub_waiting

RESUMED = (
    "budgets",
    "code_completion",
    "compare",
    "kinds",
    "longbench",
    "needle",
    "perplexity",
    "reasoning",
    "ruler",
)  # go on when given again
COMMANDS: dict[str, Any] = {
    "anchors": anchors,
    "auto": auto,
    "baselines": baselines,
    "budgets": budgets,
    "calibrate": calibrate,
    "code_completion": code_completion,
    "compare": compare,
    "decode": decode,
    "figures": figures,
    "gains": gains,
    "gates": gates,
    "generate": generate,
    "kinds": kinds,
    "layers": layers,
    "longbench": longbench,
    "lookup": lookup,
    "needle": needle,
    "objectives": objectives,
    "perplexity": perplexity,
    "reasoning": reasoning,
    "report": report,
    "ruler": ruler,
    "side_by_side": side_by_side,
    "speed": speed,
    "training": training,
}

DESCRIPTION = (
    "Measurements of gates, caches and models. Every command takes `--config FILE`. An option of a group has a flat "
    "name too, on the command line and in files: `--backbone` is `--model.backbone`."
)


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends with one line on stderr and status 2.

    Args:
        args: the command line after `python -m eval`; None: that of this process.
    """
    try:
        with one_line_errors():
            limit_hub_waiting()
            expanded = expand_aliases(sys.argv[1:] if args is None else args)
            auto_cli(
                COMMANDS,
                args=expanded,
                as_positional=False,
                parser_class=OneLineParser,
                prog="python -m eval",
                description=DESCRIPTION,
            )
    except KeyboardInterrupt:
        command = typed_command(args, ["python", "-m", "eval"])
        resumes = any(word in RESUMED for word in command)
        if not is_step():
            print(f"\n{interrupted_line(command, resumes)}", file=sys.stderr)
        sys.exit(STATUS)


if __name__ == "__main__":
    try:
        main()
    finally:
        end_quietly()
