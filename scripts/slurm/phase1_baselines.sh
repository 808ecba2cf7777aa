#!/usr/bin/env bash
# Phase 1: what eviction costs the base.   phase1_baselines.sh MODEL
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
model="$1"
out="$OUT/$(name_of "$model")/base"
unless_there "$out/compare.json" "$PYTHON" -m eval compare --config configs/eval/eit.yaml --backbone "$model" --device cuda --out "$out"
