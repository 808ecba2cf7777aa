#!/usr/bin/env bash
# Submit the measurements of all models, base and trained.   submit_all.sh [qwen3] [llama] [qwen3_trained] [llama_trained] [options of sbatch]
# Without names: all four. Each is submitted as by submit.sh; finished work is not submitted, DRY_RUN=1 only prints what would run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
names=()
while [[ $# -gt 0 && "$1" != -* ]]; do
  names+=("$1")
  shift
done
((${#names[@]})) || names=(qwen3 llama qwen3_trained llama_trained)
for name in "${names[@]}"; do check_name "$name"; done
for name in "${names[@]}"; do
  bash scripts/slurm/submit.sh "$name" "$@"
done
