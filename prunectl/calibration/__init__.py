"""Pruning by what data does in a model: inputs that weights meet, and gradients."""
