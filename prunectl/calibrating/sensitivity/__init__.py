"""How much each layer suffers from pruning, alone."""
