#!/usr/bin/env bash
# Train a small model in two stages and a dense one on the same text, and show what came of it:
# outputs/quickstart/report.md, loss.png and layer.png. A second run reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m torchtitan.experiments.lighthouse.analysis.quickstart "$@"
