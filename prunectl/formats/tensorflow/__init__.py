"""TensorFlow checkpoints and SavedModels: an index of entries, data shards, and a graph."""
