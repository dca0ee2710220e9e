"""Model file formats: recognise and open models, write copies with changed tensors, and strip them."""
