#!/usr/bin/env python3
"""See `torchtitan/experiments/lighthouse/inference/loss_by_position.py`, or --help."""

from torchtitan.experiments.lighthouse.inference.loss_by_position import main

if __name__ == "__main__":
    main()
