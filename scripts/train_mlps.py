"""Old name of `python main.py fit -c configs/gates/smollm2.yaml`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=3, help="passes over all labelled keys")
parser.add_argument("--batch_size", type=int, default=4096, help="keys per head and optimiser step")
parser.add_argument("--data", default="runs/smollm2/shards", help="folder of the shards")
args = parser.parse_args()

from main import main  # noqa: E402 - takes seconds, which --help skips

config = str(Path(__file__).parents[1] / "configs" / "gates" / "smollm2.yaml")
options = {
    "trainer.max_epochs": args.epochs,
    "data.init_args.batch_size": args.batch_size,
    "data.init_args.shards": args.data,
}
main(["fit", "-c", config, *(f"--{key}={value}" for key, value in options.items())])
