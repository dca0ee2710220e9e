"""How big, how sparse, how regular: facts counted from a model file."""
