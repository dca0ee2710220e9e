"""Structured pruning of ONNX graphs."""
