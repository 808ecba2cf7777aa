#!/usr/bin/env bash
# Phase 1: measure what eviction costs the base model.   phase1_baselines.sh MODEL
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy of this file
model="$1"
out="$OUT/$(name_of "$model")/base"
unless_there "$out/compare.json" "" "$PYTHON" -m eval compare --config configs/eval/eit.yaml --backbone "$model" --device cuda --out "$out"
if [[ -n "$PRESSES_PYTHON" ]]; then
  unless_there "$out-presses/compare.json" "" "$PRESSES_PYTHON" -m eval presses --gates null --contenders "$PRESSES" \
    --backbone "$model" --device cuda --out "$out-presses"
fi
