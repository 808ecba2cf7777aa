"""The old name of `python -m eval baselines`: python -m smartkv.experiments.validate_baselines, from the checkout."""

import runpy
import sys
from importlib.util import find_spec

COMMAND = "baselines"


def main() -> None:
    """Run the command with the arguments given; one line and status 2 where the checkout is not there."""
    if find_spec("eval") is None:
        print("error: run it from the checkout of SmartKV: the commands are no part of the installed library")
        sys.exit(2)
    sys.argv = ["eval", COMMAND, *sys.argv[1:]]
    runpy.run_module("eval", run_name="__main__")


if __name__ == "__main__":
    main()
