#!/usr/bin/env bash
# On a machine with a GPU: run the GPU tests, then the benchmarks, and print their tables last.
# scripts/gpu_check.sh [folder for the results]. PYTHON chooses an interpreter in which the project
# and pytest are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${1:-outputs/gpu_check}
mkdir -p "$output"

"$python" -m pytest tests/test_gpu.py tests/test_kernels.py -m "gpu or not gpu" -q \
    | tee "$output/tests.txt"
for flags in "" "--compile"; do
    # shellcheck disable=SC2086  # no flag at all in the first round
    "$python" scripts/bench_training.py --breakdown $flags | tee "$output/training${flags#--}.txt"
done
# A rank's share of the 1M-token run, with the loss in chunks and without.
for chunk in 2048 0; do
    "$python" scripts/bench_share.py train_configs/1m_context.toml --ranks 32 \
        --training.loss_chunk_size "$chunk" | tee "$output/share-$chunk.txt"
done
"$python" scripts/bench_attention.py --backends cudnn flash --output "$output" \
    --seq-lens 8192 16384 32768 98304 262144 524288 1048576 | tee "$output/attention.txt"
