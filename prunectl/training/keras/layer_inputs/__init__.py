"""What the weights of Keras layers meet, heard while a model runs."""
