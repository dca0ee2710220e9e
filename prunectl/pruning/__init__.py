"""What to prune: requests, strategies, schedules, policies, thresholds and plans over NumPy arrays."""

SAMPLES, BATCH_SIZE = 128, 32
"""How many examples of data are looked at, and how many at a time."""
