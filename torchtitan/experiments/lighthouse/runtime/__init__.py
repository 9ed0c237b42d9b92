"""Helpers for devices, signals, errors, files and command lines."""
