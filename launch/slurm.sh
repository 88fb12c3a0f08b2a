#!/bin/bash
# Two nodes of 8 GPUs. Slurm requeues the job when it is preempted or reaches its time limit, and
# the run resumes. Edit the two addresses (or export them), then, in a folder that all nodes share:
#     sbatch launch/slurm.sh
#SBATCH --job-name=rezero
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

REPOSITORY="${REPOSITORY:-https://github.com/OWNER/rezero_jax}"
BUCKET="${BUCKET:-gs://BUCKET}"  # or a folder that all nodes share

[ -d rezero_jax ] || git clone "$REPOSITORY" rezero_jax
cd rezero_jax
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet "jax[cuda13]" -r requirements.txt

export JAX_PLATFORMS=cuda,cpu JAX_COMPILATION_CACHE_DIR="$BUCKET/compilations"
status=0
# One process a GPU; JAX learns from Slurm which is which.
srun .venv/bin/python train.py --config=configs/transformer_enwik8.py:depth=128 \
  --workdir="$BUCKET/enwik8-128" || status=$?
case $status in
  4 | 134 | 143) scontrol requeue "$SLURM_JOB_ID" ;;  # a process (134: JAX aborted) or the bucket was lost; SIGTERM
esac
exit "$status"
