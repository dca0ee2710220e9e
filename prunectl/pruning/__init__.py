"""What to prune: requests, strategies, schedules, policies, thresholds and plans over NumPy arrays."""

SAMPLES, BATCH_SIZE = 128, 32
"""How many examples of data are looked at, and how many at a time."""
MATCHED_SAMPLES, MATCHED_BATCH_SIZE = 4096, 64
"""The same where a model is trained until it answers as it did."""
RANDOM_PREFIX = "random:"
"""What data begin with that are drawn, and read from nowhere: such a spec never names code."""
