#!/usr/bin/env bash
# Phase 2: train; a job that was cut off resumes from its last checkpoint.   phase2_train.sh MODEL
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy of this file
model="$1"
run="$(run_of "$model")"
read -r -a configs <<<"$(config_options "$run")"
unless_there "$ADAPTERS/$run/final/training.json" "" "$PYTHON" main.py fit "${configs[@]}" --out "$ADAPTERS/$run" --ckpt_path last
