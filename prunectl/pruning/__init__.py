"""What to prune: requests, strategies, schedules, policies, thresholds and plans over NumPy arrays."""

SAMPLES, BATCH_SIZE = 128, 32
"""The number of calibration examples, and the batch size."""
MATCHED_SAMPLES, MATCHED_BATCH_SIZE = 4096, 64
"""The number of examples and the batch size for output matching, other than of sequences of tokens: `BATCH_SIZE`."""
RANDOM_PREFIX = "random:"
"""The prefix of a data spec for random data: such a spec never names code."""
