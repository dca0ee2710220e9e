"""Generated code: a network as a Python class that loads the weights of a file and imports only torch."""
