"""Layer inputs (activations) of Keras models, captured while a model runs."""
