#!/usr/bin/env bash
# Phase 2: train; a job that was cut off goes on from its last checkpoint.   phase2_train.sh MODEL
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy elsewhere
model="$1"
config="$(config_of "$model")"
run="$(basename "$config" .yaml)"
unless_there "runs/eit/$run/final/training.json" "" "$PYTHON" main.py fit -c "$config" --ckpt_path last
