"""What to prune: requests, strategies, schedules, policies, thresholds and plans over NumPy arrays."""
