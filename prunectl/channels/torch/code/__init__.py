"""A network written as Python: a class that takes the weights of a file, and needs nothing but torch."""
