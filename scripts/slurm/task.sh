#!/usr/bin/env bash
# Run one task of a job as one rank: scripts/slurm/task.sh COMMAND [arguments ...].
set -euo pipefail
# SLURM signals every process of a step. Ignore signals until the trainer handles them. Nothing can
# be lost before that, and the other tasks would wait for a task that ends.
trap '' TERM USR1
# Each task sees all GPUs of the node. LOCAL_RANK chooses one.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
