#!/usr/bin/env bash
# Submit one phase for all models, at most 4 jobs at a time.   submit.sh PHASE [qwen3] [llama] [options of sbatch]
# Or what measures one model, base or trained.   submit.sh qwen3|llama|qwen3_trained|llama_trained [options of sbatch]
# PHASE: 0 analyse, 1 baselines, 2 train, 3 evaluate. Without names: all of MODELS. A name alone stands for phase 1, with _trained
# for phase 3. Finished work is not submitted; DRY_RUN=1 only prints what would run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
most="${MOST_JOBS:-4}"
phase="${1:?which phase: 0, 1, 2 or 3, or which model: qwen3, llama, qwen3_trained or llama_trained}"
case "$phase" in
  *_trained) phase=3 ;;
  [a-z]*) phase=1 ;;
  *) shift ;;
esac
case "$phase" in
  0) script=phase0_analyse.sh ;;
  1) script=phase1_baselines.sh ;;
  2) script=phase2_train.sh ;;
  3) script=phase3_evaluate.sh ;;
  *)
    echo "there is no phase '$phase': 0 analyse, 1 baselines, 2 train, 3 evaluate" >&2
    exit 2
    ;;
esac
named=()
while [[ $# -gt 0 && "$1" != -* ]]; do
  check_name "$1"
  if [[ "$1" == *_trained && "$phase" != 3 ]]; then
    echo "'$1' is measured in phase 3, not in phase $phase: give ${1%_trained}, or phase 3" >&2
    exit 2
  fi
  named+=("$(id_of "$1")")
  shift
done
((${#named[@]})) && MODELS="${named[*]}"
read -r -a extra <<<"${SBATCH_OPTIONS:-}"

# print the names of SmartKV's jobs in the queue, one per line: smartkv-PHASE-MODEL
queued_jobs() {
  local queue
  queue="$(squeue --noheader --me --format %j)" || return 1
  grep '^smartkv-' <<<"$queue" || true
}

wait_for_room() {
  local sent
  while true; do
    sent="$(queued_jobs)" || { echo "squeue does not answer: nothing is sent" >&2; exit 1; }
    (($(grep --count . <<<"$sent") < most)) && return
    sleep 60
  done
}

mkdir -p "$OUT"

for model in $MODELS; do
  if [[ "$DRY_RUN" == 1 ]]; then
    echo "would send: $script $model"
    DRY_RUN=1 bash "scripts/slurm/$script" "$model"
    continue
  fi
  plan="$(DRY_RUN=1 bash "scripts/slurm/$script" "$model")" || exit 1
  if [[ "$plan" != *"would run"* ]]; then
    echo "nothing to do: $script $model"
    continue
  fi
  name="smartkv-$phase-$(name_of "$model")"
  wait_for_room
  if queued_jobs | grep --quiet --line-regexp --fixed-strings "$name"; then
    echo "sent already: $script $model"
    continue
  fi
  sbatch --job-name "$name" --gres gpu:1 --cpus-per-task 8 --mem 96G --time 24:00:00 \
    --output "$OUT/slurm-%j.log" --export "ALL,SMARTKV_CHECKOUT=$PWD" \
    "${extra[@]}" "$@" "scripts/slurm/$script" "$model"
done
