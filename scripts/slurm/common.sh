# shellcheck shell=bash
# Shared by all phases. Set for your cluster: SBATCH_OPTIONS, the options of sbatch (partition, account), and ENVIRONMENT, a
# file that is sourced to enter the Python environment. MODELS: hub ids. OUT: folder for measurements. ADAPTERS: folder of the
# runs that train, whose adapters are in RUN/final.
set -euo pipefail
cd "${SMARTKV_CHECKOUT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
OUT="${OUT:-runs/eit}"
ADAPTERS="${ADAPTERS:-runs/eit}"
MODELS="${MODELS:-Qwen/Qwen3-8B meta-llama/Llama-3.1-8B}"
PYTHON="${PYTHON:-python}"
DRY_RUN="${DRY_RUN:-0}"
PRESSES_PYTHON="${PRESSES_PYTHON:-}"  # Python with kvpress (make .venv-kvpress/.installed); empty: no presses
PRESSES="${PRESSES:-[\"press:knorm\", \"press:keydiff\", \"press:snapkv\", \"press:expected_attention\"]}"
if [[ -n "${ENVIRONMENT:-}" ]]; then
  # shellcheck disable=SC1090
  source "$ENVIRONMENT"
fi

# print a model's id as a file name
name_of() { tr '/' '_' <<<"$1"; }

# unless_there RESULT SOURCE COMMAND…: run the command unless RESULT exists and is newer than SOURCE ("": no source); with
# DRY_RUN=1 only print it
unless_there() {
  local result="$1" of="$2"
  shift 2
  if [[ -e "$result" && (-z "$of" || "$result" -nt "$of") ]]; then
    echo "done already: $result"
  elif [[ "$DRY_RUN" == 1 ]]; then
    echo "would run: $*"
  else
    "$@"
  fi
}

# print the hub id of a short name: of qwen3 and qwen3_trained the same
id_of() {
  case "${1%_trained}" in
    qwen3) echo Qwen/Qwen3-8B ;;
    llama) echo meta-llama/Llama-3.1-8B ;;
  esac
}

# end with status 2 if a name is no short name
check_name() {
  if [[ -z "$(id_of "$1")" ]]; then
    echo "there is no model '$1': expected qwen3, llama, qwen3_trained or llama_trained" >&2
    exit 2
  fi
}

# print the name of a model's run below ADAPTERS
run_of() {
  case "$1" in
    Qwen/Qwen3-8B) echo qwen3-8b ;;
    meta-llama/Llama-3.1-8B) echo llama-3.1-8b ;;
    Qwen/Qwen2.5-0.5B) echo qwen2.5-0.5b ;;
    smollm2-135m) echo smollm2 ;;
    *)
      echo "no config for '$1' in configs/eviction_tuning: write an overlay, and name it in run_of" >&2
      return 1
      ;;
  esac
}

# print the options of main.py that name a run's configs: the base, and the overlay of the run's name if it has one
config_options() {
  local overlay="configs/eviction_tuning/$1.yaml"
  echo "-c configs/eviction_tuning/base.yaml $([[ ! -e "$overlay" ]] || echo "-c $overlay")"
}
