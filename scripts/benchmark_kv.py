"""Old name of `python -m eval perplexity`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--gates", default="runs/smollm2/gates/export", help="folder of exported gates, or hub id")
parser.add_argument("--out", default="runs/benchmark", help="folder for perplexity.json and the pictures")
args = parser.parse_args()

from eval.__main__ import main  # noqa: E402 - takes seconds, which --help skips

config = str(Path(__file__).parents[1] / "configs" / "eval" / "perplexity.yaml")
main(["perplexity", "--config", config, "--gates", args.gates, "--out", args.out])
