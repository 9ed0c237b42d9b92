#!/usr/bin/env python3
"""See `torchtitan/experiments/lighthouse/analysis/report.py`, or --help."""

from torchtitan.experiments.lighthouse.analysis.report import main

if __name__ == "__main__":
    main()
