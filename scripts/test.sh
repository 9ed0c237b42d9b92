#!/usr/bin/env bash
# Run the tests: scripts/test.sh [arguments of pytest]. Sets up .venv, or VENV, on the first run.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
# One process per core with one thread each. Small tensors gain nothing from more threads.
export OMP_NUM_THREADS=1
exec "$bin/python" -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile \
    --durations 25 "$@"
