#!/usr/bin/env bash
# Phase 3: measure what eviction costs the trained model, under the same policies.   phase3_evaluate.sh MODEL
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy of this file
model="$1"
run="$(run_of "$model")"
adapter="$ADAPTERS/$run/final"
out="$OUT/$(name_of "$model")/trained"
base="$OUT/$(name_of "$model")/base"
if [[ ! -e "$adapter/training.json" ]]; then
  echo "not trained yet: $adapter (phase 2)"
  exit 0
fi
unless_there "$out/compare.json" "$adapter/adapter_model.safetensors" "$PYTHON" -m eval compare --config configs/eval/eit.yaml \
  --backbone "$model" --device cuda --adapter "$adapter" --out "$out"
unless_there "$out/gains.json" "$out/compare.json" "$PYTHON" -m eval gains --base "$base" --trained "[\"$out\"]" --out "$out"
if [[ -n "$PRESSES_PYTHON" ]]; then
  unless_there "$out-presses/compare.json" "$adapter/adapter_model.safetensors" "$PRESSES_PYTHON" -m eval presses --gates null \
    --contenders "$PRESSES" --backbone "$model" --device cuda --adapter "$adapter" --out "$out-presses"
  unless_there "$out-presses/gains.json" "$out-presses/compare.json" "$PYTHON" -m eval gains --base "$base-presses" \
    --trained "[\"$out-presses\"]" --out "$out-presses"
fi
