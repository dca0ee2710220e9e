"""Files of PyTorch: every layout that torch.save, torch.jit.save and torch.export.save ever wrote."""
