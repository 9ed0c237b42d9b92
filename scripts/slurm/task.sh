#!/usr/bin/env bash
# One task of a job, as one rank: scripts/slurm/task.sh COMMAND [arguments ...].
set -euo pipefail
# SLURM signals every process of a step. Until the trainer listens nothing can be lost, and one
# task that ends would leave the others waiting for it.
trap '' TERM USR1
# All GPUs of the node stay visible to each of its tasks: LOCAL_RANK chooses.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
