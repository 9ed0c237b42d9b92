#!/usr/bin/env bash
# On a machine with a GPU: run the GPU tests, then the benchmarks, and print their tables last.
# scripts/gpu_check.sh [folder for the results] [parts]
# Parts are tests, training, share and attention. By default all run, also after one has failed.
# The folder gets the output of each part, and gpu.md with hardware and versions.
# PYTHON chooses an interpreter in which the project is installed, with its extra `dev`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${1:-outputs/gpu_check}
parts=${*:2}
known="tests training share attention"
parts=${parts:-$known}
for part in $parts; do
    if [[ " $known " != *" $part "* ]]; then
        echo "a part must be one of $known, got $part" >&2
        exit 2
    fi
done
mkdir -p "$output"
failed=()

# keep NAME COMMAND ...: run the command and write its output to NAME.txt.
keep() {
    "${@:2}" 2>&1 | tee "$output/$1.txt" || failed+=("$1")
}

for part in $parts; do
    case $part in
        tests)
            # These tests spend most of their time compiling kernels.
            keep kernels "$python" -m pytest tests/attention/test_kernels.py -q --numprocesses 8
            keep tests "$python" -m pytest tests/attention/test_gpu.py -m gpu -q
            ;;
        training)
            keep training "$python" scripts/bench_training.py --breakdown
            keep training-compile "$python" scripts/bench_training.py --breakdown --compile
            ;;
        share)
            # A rank's share of the 1M-token run, with the loss in chunks and without.
            for chunk in 2048 0; do
                keep "share-$chunk" "$python" scripts/bench_share.py train_configs/1m_context.toml \
                    --world-size 32 --training.loss_chunk_size "$chunk"
            done
            # The same in stage 2 on pieces.
            keep share-pieces "$python" scripts/bench_share.py \
                train_configs/1m_context_pieces.toml --world-size 32 --lighthouse.stage1_steps 0
            ;;
        attention)
            keep attention "$python" -m lighthouse_cli bench --backends cudnn flash \
                --pool-rotary averaged aligned --output "$output" \
                --seq-lens 8192 16384 32768 98304 262144 524288 1048576
            ;;
    esac
done

{
    echo "# On a GPU, $(date +%F)"
    echo
    echo "\`scripts/gpu_check.sh\`, commit $(git describe --always --dirty 2>/dev/null || echo unknown):"
    "$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__,
        "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "triton", triton.__version__)' \
        || echo "no GPU"
    for text in kernels tests training training-compile share-2048 share-0 share-pieces attention; do
        [[ -f $output/$text.txt ]] || continue
        printf '\n## %s\n\n```\n' "$text"
        # The last line of a benchmark is its JSON.
        grep -v '^{' "$output/$text.txt" || true
        echo '```'
    done
} >"$output/gpu.md"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}; see $output" >&2
    exit 1
fi
