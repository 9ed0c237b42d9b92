"""Trained models: loading, generation, export."""
