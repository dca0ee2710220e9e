"""Channels cut out for good: what goes together, what goes first, and the smaller network."""
