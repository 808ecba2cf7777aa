#!/usr/bin/env bash
# What a GPU does with SmartKV: nine minutes, random weights, nothing but torch, transformers, lightning and peft needed.
#   scripts/gpu_check.sh                     on the GPU; results in runs/gpu
#   OUT=docs scripts/gpu_check.sh            into docs/gpu.json and docs/gpu.md
#   scripts/gpu_check.sh --device cpu --tiny try the check itself
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -u -m eval.gpu --out "${OUT:-runs/gpu}" "$@"
