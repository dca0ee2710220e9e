"""Networks of PyTorch: traced, followed, cut, and written as files that nothing but torch is needed for."""
