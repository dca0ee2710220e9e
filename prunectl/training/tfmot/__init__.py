"""Pruning by tensorflow-model-optimization itself, in models of Keras 2."""
