#!/usr/bin/env bash
# Train a small model in two stages, and one with dense attention, on the same text. The results are
# outputs/quickstart/report.md, loss.png and layer.png. A second call reuses finished runs.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m torchtitan.experiments.lighthouse.analysis.quickstart "$@"
