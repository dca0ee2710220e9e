"""Prune saved neural networks on disk."""

__version__ = "0.1.0"
