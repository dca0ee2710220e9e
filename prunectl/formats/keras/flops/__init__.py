"""Multiply-accumulate operations of Keras models, counted from their configuration alone."""
