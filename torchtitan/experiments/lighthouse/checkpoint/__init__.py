"""Save, verify, compare and load checkpoints, and record the switch between the stages."""
