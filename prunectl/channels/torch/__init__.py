"""Structured pruning of PyTorch networks: traced to a torch.fx graph, and written as files that need only torch."""
