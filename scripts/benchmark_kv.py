"""Old name of `python -m eval perplexity`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__, epilog="Other options are those of the new command.")
parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder, .gguf file or smollm2-135m")
parser.add_argument("--gates", default="runs/smollm2/gates/export", help="folder of exported gates, or hub id")
parser.add_argument("--out", default="runs/benchmark", help="folder for perplexity.json and the pictures")
args, more = parser.parse_known_args()

from eval.__main__ import main  # noqa: E402 - takes seconds, which --help skips

config = str(Path(__file__).parents[1] / "configs" / "eval" / "perplexity.yaml")
options = ["--backbone", args.model, "--gates", args.gates, "--out", args.out]
main(["perplexity", "--config", config, *options, *more])
