"""Structured pruning of PyTorch networks: traced by torch.export, written as files that need torch alone."""
