#!/usr/bin/env python3
"""Train in two stages and dense for as long, and compare: see `analysis/quickstart.py`."""

from torchtitan.experiments.lighthouse.analysis.quickstart import main

if __name__ == "__main__":
    main()
