"""What a run will do and need, counted before it starts."""
