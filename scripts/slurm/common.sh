# shellcheck shell=bash
# What all phases share. To be set for your cluster: the options of sbatch (partition, account) in SBATCH_OPTIONS, and how
# the environment is entered, in ENVIRONMENT. MODELS: hub ids; OUT: where measurements go (adapters: runs/eit, by their configs).
set -euo pipefail
cd "${SMARTKV_CHECKOUT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
OUT="${OUT:-runs/eit}"
MODELS="${MODELS:-Qwen/Qwen3-8B meta-llama/Llama-3.1-8B}"
PYTHON="${PYTHON:-python}"
DRY_RUN="${DRY_RUN:-0}"
PRESSES_PYTHON="${PRESSES_PYTHON:-}"  # of an environment with kvpress (make .venv-kvpress/.installed); empty: no presses
PRESSES="${PRESSES:-[\"press:knorm\", \"press:keydiff\", \"press:snapkv\", \"press:expected_attention\"]}"
if [[ -n "${ENVIRONMENT:-}" ]]; then
  # shellcheck disable=SC1090
  source "$ENVIRONMENT"
fi

# a model's id as the name of a file
name_of() { tr '/' '_' <<<"$1"; }

# run a command unless its result is there, and newer than what it was made of ("": nothing); with DRY_RUN=1 only say it
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

# the config of a model in configs/eit
config_of() {
  case "$1" in
    Qwen/Qwen3-8B) echo configs/eit/qwen3-8b.yaml ;;
    meta-llama/Llama-3.1-8B) echo configs/eit/llama-3.1-8b.yaml ;;
    Qwen/Qwen2.5-0.5B) echo configs/eit/qwen2.5-0.5b.yaml ;;
    smollm2-135m) echo configs/eit/smollm2.yaml ;;
    *)
      echo "no config for '$1' in configs/eit: write one" >&2
      return 1
      ;;
  esac
}
