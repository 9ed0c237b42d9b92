#!/usr/bin/env python3
"""See `torchtitan/experiments/lighthouse/planner/render.py`, or --help."""

from torchtitan.experiments.lighthouse.planner.render import main

if __name__ == "__main__":
    main()
