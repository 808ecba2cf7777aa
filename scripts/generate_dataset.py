"""Old name of `python main.py predict -c configs/harvest/smollm2.yaml`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--num_samples", type=int, default=500, help="windows; a tenth of them for validation")
parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder, .gguf file or smollm2-135m")
parser.add_argument("--out", default="runs/smollm2/shards", help="folder of the shards")
args = parser.parse_args()

from main import main  # noqa: E402 - takes seconds, which --help skips

validation = max(1, args.num_samples // 10)
config = str(Path(__file__).parents[1] / "configs" / "harvest" / "smollm2.yaml")
options = {
    "model.init_args.backbone": args.model,
    "data.init_args.backbone": args.model,
    "out": args.out,
    "data.init_args.windows": f"{{train: {args.num_samples - validation}, validation: {validation}}}",
}
main(["predict", "-c", config, *(f"--{key}={value}" for key, value in options.items())])
