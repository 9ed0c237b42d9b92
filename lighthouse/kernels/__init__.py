"""Triton kernels of the data path, one file for each stage file of the same name."""
