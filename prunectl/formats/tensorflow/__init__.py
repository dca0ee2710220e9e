"""Checkpoints and SavedModels: a table of entries, shards of bytes, a graph."""
