#!/usr/bin/env bash
# Train on this machine: scripts/run_train.sh CONFIG [overrides ...], for example
#     scripts/run_train.sh train_configs/debug.toml --training.steps 100
# Starts a process for each GPU, or one on the CPU where there is none; NPROC=n starts n. One needs no
# torchrun, which would hide its exit code.
set -euo pipefail
if [[ $# == 0 || $1 == -* ]]; then
    echo "error: CONFIG must come first, got '${1:-}'; scripts/run_train.sh CONFIG [overrides ...]" >&2
    exit 2
fi
if [[ ! -f $1 ]]; then
    echo "error: CONFIG must be a TOML file, got '$1', which is none; correct the path" >&2
    exit 2
fi
config=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
python=python3
if [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
num_gpus='import torch; print(max(1, torch.cuda.device_count()))'
num_processes=${NPROC:-$("$python" -c "$num_gpus")}
if [[ ! $num_processes =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC must be a number of at least 1, got '$num_processes'; correct it" >&2
    exit 2
fi
command=("$python")
if [[ $num_processes != 1 ]]; then
    command+=(-m torch.distributed.run --standalone --nproc-per-node "$num_processes")
fi
exec "${command[@]}" -m torchtitan.experiments.lighthouse.train \
    --job.config_file "$config" "$@"
