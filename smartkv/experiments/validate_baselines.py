"""Old name of `python -m eval baselines`, to be run from the checkout.

Usage:
    python -m smartkv.experiments.validate_baselines [arguments of `python -m eval baselines`]
"""

import runpy
import sys
from importlib.util import find_spec

COMMAND = "baselines"


def main() -> None:
    """Run `python -m eval baselines` with the given arguments.

    Outside the checkout it prints one line and exits with status 2.
    """
    if find_spec("eval") is None:
        print("error: run it from the checkout of SmartKV: the commands are not part of the installed library")
        sys.exit(2)
    sys.argv = ["eval", COMMAND, *sys.argv[1:]]
    runpy.run_module("eval", run_name="__main__")


if __name__ == "__main__":
    main()
