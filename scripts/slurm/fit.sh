#!/usr/bin/env bash
# Any run of main.py on one node or several.   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm/fit.sh fit -c configs/gates/smollm2.yaml
# Lightning reads SLURM's own variables: one task per GPU, no launcher. The same command resumes the run.
#SBATCH --job-name smartkv-fit
#SBATCH --ntasks-per-node 8
#SBATCH --cpus-per-task 8
#SBATCH --time 24:00:00
#SBATCH --signal SIGUSR1@120
#SBATCH --requeue
source "${SMARTKV_CHECKOUT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}/scripts/slurm/common.sh"  # SLURM runs a copy of this file
command=(srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "$PYTHON" main.py "$@"
  --trainer.num_nodes "${SLURM_JOB_NUM_NODES:-1}" --trainer.devices "${SLURM_NTASKS_PER_NODE:-8}")
if [[ "$1" == fit && " $* " != *" --ckpt_path"* ]]; then command+=(--ckpt_path last); fi
if [[ "$DRY_RUN" == 1 ]]; then
  echo "would run: ${command[*]}"
else
  "${command[@]}"
fi
