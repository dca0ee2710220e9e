"""Pruning with calibration data: activation statistics, gradients, SparseGPT, reconstruction."""
