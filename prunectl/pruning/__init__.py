"""What to drop: pure functions and small values over NumPy arrays."""
