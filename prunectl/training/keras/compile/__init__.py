"""How a Keras model is compiled: losses, metrics, optimizer."""
