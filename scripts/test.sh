#!/usr/bin/env bash
# Run the tests: scripts/test.sh [arguments of pytest]. Sets up .venv on the first run.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -m "not slow and not gpu" "$@"
