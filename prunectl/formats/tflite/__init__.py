"""TensorFlow Lite files: a FlatBuffer."""
