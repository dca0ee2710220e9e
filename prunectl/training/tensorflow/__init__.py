"""Training SavedModels that are no Keras models."""
