"""`python -m eval <command> --help`; every command takes `--config FILE` as well."""

import sys

from jsonargparse import auto_cli

from eval.anchors import anchors
from eval.auto import auto
from eval.calibrate import calibrate
from eval.compare import compare
from eval.decode import decode
from eval.gains import gains
from eval.gates import gates
from eval.generate import generate
from eval.layers import layers
from eval.longbench import longbench
from eval.needle import needle
from eval.objectives import objectives
from eval.perplexity import perplexity
from eval.reasoning import reasoning
from eval.report import report
from eval.ruler import ruler
from eval.speed import speed
from eval.spellings import spelled_out
from eval.training import training
from eval.validation import baselines
from smartkv.errors import said_in_one_line
from smartkv.hub import answer_in_time

COMMANDS = {
    "anchors": anchors,
    "auto": auto,
    "baselines": baselines,
    "calibrate": calibrate,
    "compare": compare,
    "decode": decode,
    "gains": gains,
    "gates": gates,
    "generate": generate,
    "layers": layers,
    "longbench": longbench,
    "needle": needle,
    "objectives": objectives,
    "perplexity": perplexity,
    "reasoning": reasoning,
    "report": report,
    "ruler": ruler,
    "speed": speed,
    "training": training,
}


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends with one line on stderr and status 2."""
    with said_in_one_line():
        answer_in_time()
        given = spelled_out(sys.argv[1:] if args is None else args)
        auto_cli(COMMANDS, args=given, as_positional=False, prog="python -m eval")


if __name__ == "__main__":
    main()
