"""Structured pruning: dependency groups, importance, and a smaller network that is verified."""
