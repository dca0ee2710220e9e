"""Pruning wrappers as frameworks have them: who writes them, and what they keep of a schedule."""
