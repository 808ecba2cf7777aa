#!/usr/bin/env bash
# Phase 0: measure which tokens receive the attention.   phase0_analyse.sh MODEL
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy of this file
model="$1"
out="$OUT/$(name_of "$model")/anchors"
unless_there "$out/anchors.json" "" "$PYTHON" -m eval anchors --backbone "$model" --device cuda --dtype bfloat16 --out "$out"
