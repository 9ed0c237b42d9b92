"""The fields of a run and their rules."""
