"""Triton kernels. Each stage of the method has a file of the same name here."""
