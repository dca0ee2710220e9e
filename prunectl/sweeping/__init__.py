"""Sweeps: one model pruned with many strategies, scopes, sparsities and schedules, evaluated on the user's data."""
