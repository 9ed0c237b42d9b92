#!/usr/bin/env python3
"""See `torchtitan/experiments/lighthouse/analysis/sweep.py`, or --help."""

from torchtitan.experiments.lighthouse.analysis.sweep import main

if __name__ == "__main__":
    main()
