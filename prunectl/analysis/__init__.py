"""Statistics of models: sizes, sparsity, patterns of zeros, and latency."""
