#!/usr/bin/env python3
"""See `torchtitan/experiments/lighthouse/inference/passkey.py`, or --help."""

from torchtitan.experiments.lighthouse.inference.passkey import main

if __name__ == "__main__":
    main()
