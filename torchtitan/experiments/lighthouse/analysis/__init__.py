"""What the metrics of a run say, and how runs compare."""
