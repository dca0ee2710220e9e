"""Structured pruning of Keras files: the configuration is the graph."""
