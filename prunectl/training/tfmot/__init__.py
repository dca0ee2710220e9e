"""Pruning of Keras 2 models by tensorflow-model-optimization (tfmot)."""
