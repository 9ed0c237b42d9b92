"""Devices, signals, errors, files, command lines."""
