#!/usr/bin/env bash
# Phase 3: what eviction costs the trained model, under the same policies.   phase3_evaluate.sh MODEL
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy elsewhere
model="$1"
run="$(basename "$(config_of "$model")" .yaml)"
out="$OUT/$(name_of "$model")/trained"
unless_there "$out/compare.json" "$PYTHON" -m eval compare --config configs/eval/eit.yaml --backbone "$model" --device cuda \
  --adapter "runs/eit/$run/final" --out "$out"
