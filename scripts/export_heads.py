"""One file a head, for tools that know that layout: `export_heads.py shards|gates FOLDER OUT`.

Shards: `l{layer}_h{head}/shard_{n}.safetensors` with `keys` [rows, head_dim] and `target` [rows] (log4 lifespan).
Gates: `l{layer}_h{head}.safetensors`, the state dict of `nn.Sequential(Linear, ReLU, Linear)` under the name `net`.
"""

import argparse
import sys
from pathlib import Path

from smartkv import GateBank, Manifest, SmartKVError
from smartkv.shards.per_head_export import export_heads

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["shards", "gates"])
parser.add_argument("source", type=Path, help="folder of shards, or of exported gates")
parser.add_argument("out", type=Path)
parser.add_argument("--threshold", type=float, default=0.05, help="of the shards' lifespans")
parser.add_argument("--split", default="train", help="of the shards")
args = parser.parse_args()
try:
    if args.what == "shards":
        print(f"{export_heads(Manifest.read(args.source), args.out, args.threshold, args.split)} files in {args.out}")
    else:
        gates = GateBank.from_pretrained(args.source)
        gates.export_heads(args.out)
        print(f"{len(gates)} files in {args.out}")
except SmartKVError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
