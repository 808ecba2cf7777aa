"""Old name of `python main.py fit -c configs/gates/smollm2.yaml`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__, epilog="Other options are those of the new command.")
parser.add_argument("--epochs", type=int, default=3, help="passes over all labelled keys")
parser.add_argument("--batch_size", type=int, default=4096, help="keys per head and optimiser step")
parser.add_argument("--data", default="runs/smollm2/shards", help="folder of the shards")
parser.add_argument("--model", help="the model that the shards must be from; left out: any")
parser.add_argument("--out", default="runs/smollm2/gates", help="folder of the run; the gates are in its folder export")
args, more = parser.parse_known_args()

from main import main  # noqa: E402 - takes seconds, which --help skips
from smartkv.errors import SmartKVError, one_line_errors  # noqa: E402
from smartkv.shards.manifest import Manifest  # noqa: E402

with one_line_errors():
    harvested = Manifest.read(Path(args.data)).arguments["backbone"] if args.model else None
    if harvested != args.model:
        raise SmartKVError(f"the shards in {args.data} are from {harvested}, not from {args.model}: give --data")

config = str(Path(__file__).parents[1] / "configs" / "gates" / "smollm2.yaml")
options = {
    "out": args.out,
    "trainer.max_epochs": args.epochs,
    "data.init_args.batch_size": args.batch_size,
    "data.init_args.shards": args.data,
}
main(["fit", "-c", config, *(f"--{key}={value}" for key, value in options.items()), *more])
