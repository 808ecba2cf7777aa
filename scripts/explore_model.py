"""Old name of `python -m eval calibrate`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__, epilog="Other options are those of the new command.")
parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder, .gguf file or smollm2-135m")
parser.add_argument("--out", default="runs/explore", help="folder for calibrate.json and the pictures")
args, more = parser.parse_known_args()

from eval.__main__ import main  # noqa: E402 - takes seconds, which --help skips

config = str(Path(__file__).parents[1] / "configs" / "eval" / "calibrate.yaml")
main(["calibrate", "--config", config, "--backbone", args.model, "--out", args.out, *more])
